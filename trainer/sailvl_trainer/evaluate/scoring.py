"""Score answers between 0 and 1 by the rules that the authors of the benchmarks published. Called by benchmark.py."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from sailvl_trainer.contract import Metric
from sailvl_trainer.evaluate.cells import parse_list
from sailvl_trainer.evaluate.tsv import Question

_ARTICLES = frozenset({"a", "an", "the"})
_DIGITS = {
    word: str(n)
    for n, word in enumerate("zero one two three four five six seven eight nine ten".split())  # noqa: SIM905
} | {"none": "0"}


def normalise_answer(text: str) -> str:
    """Normalise as VQA does: lower case, digits for numerals, no articles, no punctuation except in numbers."""
    bare = re.sub(r"['’`]", "", text.lower())
    spaced = re.sub(r"(?!(?<!\w)-\d)[^\w\s.:]", " ", bare)  # a minus sign is kept
    tokens = spaced.replace(". ", " ").strip(" .").split()
    return " ".join(_DIGITS.get(token, token) for token in tokens if token not in _ARTICLES) or bare.strip()


def parse_accepted_answers(question: Question) -> list[str]:
    """Return the accepted answers: the strings of a Python list, else the whole cell (also for a list of numbers)."""
    text = question.answer.strip()
    found = parse_list(text)
    strings = [answer for answer in found or () if isinstance(answer, str)]
    return [text] if found is None or len(strings) < len(found) else strings


def exact_match(prediction: str, question: Question) -> float:
    """Return 1 if the prediction equals any accepted answer after normalisation."""
    accepted = {normalise_answer(answer) for answer in parse_accepted_answers(question)}
    return float(normalise_answer(prediction) in accepted)


def multiple_choice(prediction: str, question: Question) -> float:
    """Return 1 if the prediction means the choice of the reference answer; see find_choice."""
    return float(find_choice(prediction, question.choices) == question.answer.strip().upper())


def find_choice(prediction: str, choices: dict[str, str]) -> str | None:
    """Return the letter of the choice that a prediction means, or None if it means none or several.

    In order: a letter alone, the text of a choice, a letter within the text, a choice's text within the text.
    """
    text, normalised = prediction.strip(), {letter: normalise_answer(choice) for letter, choice in choices.items()}
    if single := re.fullmatch(r"\W*([A-Za-z])\W*", text):
        letter = single[1].upper()
        return letter if letter in choices else None
    equal = [letter for letter, choice in normalised.items() if choice == normalise_answer(text)]
    if len(equal) == 1:
        return equal[0]
    # "A" before a lower-case letter is the article
    letters = set(re.findall(r"(?<![\w'])(?!A (?!or |and |is )[a-z])([A-Z])(?![\w'])", text)) & set(choices)
    if letters:
        return letters.pop() if len(letters) == 1 else None
    return _find_contained_choice(normalise_answer(text), normalised)


def _find_contained_choice(text: str, choices: dict[str, str]) -> str | None:
    """Return the choice whose text the prediction contains; of choices that contain each other the longest."""
    contained = {
        letter: choice for letter, choice in choices.items() if re.search(rf"(?<!\S){re.escape(choice)}(?!\S)", text)
    }
    longest = [letter for letter, choice in contained.items() if all(other in choice for other in contained.values())]
    return longest[0] if len(longest) == 1 else None


def vqa_accuracy(prediction: str, question: Question) -> float:
    """Return VQAv2's accuracy (arXiv 1612.00837): mean of min(1, agreeing / 3) over leave-one-out sets of answers."""
    predicted = normalise_answer(prediction)
    answers = [normalise_answer(answer) for answer in parse_accepted_answers(question)]
    if len(answers) == 1:
        return float(predicted == answers[0])
    agreeing = [answer == predicted for answer in answers]
    return sum(min(1.0, (sum(agreeing) - own) / 3) for own in agreeing) / len(answers)


def relaxed_accuracy(prediction: str, question: Question) -> float:
    """Return 1 by ChartQA's rule (arXiv 2203.10244): numbers within 5 %, text exactly; a number with commas is text."""
    predicted = _parse_number(prediction)
    for answer in parse_accepted_answers(question):
        expected = _parse_number(answer)
        if predicted is not None and expected is not None:
            if abs(predicted - expected) <= 0.05 * abs(expected):
                return 1.0
        elif prediction.strip().lower() == answer.strip().lower():
            return 1.0
    return 0.0


def anls(prediction: str, question: Question) -> float:
    """Return DocVQA's ANLS (arXiv 2007.00398): 1 - normalised edit distance to the closest answer, 0 if at most 0.5."""
    predicted = prediction.strip().lower()
    best = max(_compute_similarity(predicted, answer.strip().lower()) for answer in parse_accepted_answers(question))
    return best if best > 0.5 else 0.0


def yes_no_f1(predictions: Sequence[str], questions: Sequence[Question]) -> float:
    """Return the F1 score of yes as in POPE (arXiv 2305.10355); an answer with neither yes nor no counts as no."""
    pairs = [(is_yes(p), is_yes(q.answer)) for p, q in zip(predictions, questions, strict=True)]
    true_positives = sum(p and q for p, q in pairs)
    predicted, actual = sum(p for p, _ in pairs), sum(q for _, q in pairs)
    return 2 * true_positives / (predicted + actual) if predicted + actual else 0.0


def is_yes(text: str) -> bool:
    """Whether yes occurs in the text before any no or not."""
    return _find_yes_or_no(text) == "yes"


def _find_yes_or_no(text: str) -> str:
    """Return yes or no, whichever occurs first, or an empty string."""
    found = re.search(r"\b(yes|no|not)\b", text.lower())
    if found is None:
        return ""
    return "yes" if found.group(1) == "yes" else "no"


_ANSWER_METRICS: dict[str, Callable[[str, Question], float]] = {
    "exact_match": exact_match,
    "multiple_choice": multiple_choice,
    "vqa_accuracy": vqa_accuracy,
    "relaxed_accuracy": relaxed_accuracy,
    "anls": anls,
}


def score_answers(
    metric: Metric, predictions: Sequence[str], questions: Sequence[Question]
) -> tuple[float, list[float]]:
    """Return the score of the benchmark and the scores of its answers, all between 0 and 1."""
    if metric == "yes_no_f1":
        scores = [
            float(_find_yes_or_no(p) == _find_yes_or_no(q.answer)) for p, q in zip(predictions, questions, strict=True)
        ]
        return yes_no_f1(predictions, questions), scores
    scores = [_ANSWER_METRICS[metric](p, q) for p, q in zip(predictions, questions, strict=True)]
    return sum(scores) / max(1, len(scores)), scores


def _parse_number(text: str) -> float | None:
    cleaned = text.strip().rstrip("%")
    try:
        return float(cleaned) / (100 if text.strip().endswith("%") else 1)
    except ValueError:
        return None


def _compute_similarity(a: str, b: str) -> float:
    return 1 - _compute_edit_distance(a, b) / max(len(a), len(b), 1)


def _compute_edit_distance(a: str, b: str) -> int:
    """Return the Levenshtein distance."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]
