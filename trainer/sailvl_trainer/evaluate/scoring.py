"""From an answer to a score between 0 and 1, by the rules that the benchmarks' authors published."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from sailvl_trainer.contract import Metric
from sailvl_trainer.evaluate.tsv import Question, parse_list

_ARTICLES = frozenset({"a", "an", "the"})
_NUMBERS = {
    word: str(n)
    for n, word in enumerate("zero one two three four five six seven eight nine ten".split())  # noqa: SIM905
} | {"none": "0"}


def normalise(text: str) -> str:
    """VQA's normalisation: lower case, no punctuation but a number's, no articles, numbers as digits."""
    bare = re.sub(r"['’`]", "", text.lower())
    words = re.sub(r"(?!(?<!\w)-\d)[^\w\s.:]", " ", bare)  # a minus stays
    kept = words.replace(". ", " ").strip(" .").split()
    return " ".join(_NUMBERS.get(word, word) for word in kept if word not in _ARTICLES) or bare.strip()


def answers_of(question: Question) -> list[str]:
    """The accepted answers: one, or a list of strings written as in Python; a list of numbers is one answer."""
    text = question.answer.strip()
    found = parse_list(text)
    strings = [answer for answer in found or () if isinstance(answer, str)]
    return [text] if found is None or len(strings) < len(found) else strings


def exact_match(prediction: str, question: Question) -> float:
    """Equal to any accepted answer after normalisation."""
    return float(normalise(prediction) in {normalise(answer) for answer in answers_of(question)})


def multiple_choice(prediction: str, question: Question) -> float:
    """The chosen letter, or the one choice whose text is in the answer."""
    return float(find_choice(prediction, question.choices) == question.answer.strip().upper())


def find_choice(prediction: str, choices: dict[str, str]) -> str | None:
    """The letter that an answer means; None when it means none or several."""
    text, by_words = prediction.strip(), {letter: normalise(words) for letter, words in choices.items()}
    if alone := re.fullmatch(r"\W*([A-Za-z])\W*", text):
        return alone.group(1).upper() if alone.group(1).upper() in choices else None
    equal = [letter for letter, words in by_words.items() if words == normalise(text)]
    if len(equal) == 1:
        return equal[0]
    # an A before a small letter is the article
    letters = set(re.findall(r"(?<![\w'])(?!A (?!or |and |is )[a-z])([A-Z])(?![\w'])", text)) & set(choices)
    return next(iter(letters)) if len(letters) == 1 else None if letters else _find_named(normalise(text), by_words)


def _find_named(given: str, by_words: dict[str, str]) -> str | None:
    """The one choice whose words stand in the answer; of choices that contain each other the longest."""
    named = {
        letter: words for letter, words in by_words.items() if re.search(rf"(?<!\S){re.escape(words)}(?!\S)", given)
    }
    longest = [letter for letter, words in named.items() if all(other in words for other in named.values())]
    return longest[0] if len(longest) == 1 else None


def vqa_accuracy(prediction: str, question: Question) -> float:
    """VQAv2 (arXiv 1612.00837): over the leave-one-out sets of the answers, min(1, agreeing / 3)."""
    given, answers = normalise(prediction), [normalise(answer) for answer in answers_of(question)]
    if len(answers) == 1:
        return float(given == answers[0])
    agreeing = [answer == given for answer in answers]
    return sum(min(1.0, (sum(agreeing) - own) / 3) for own in agreeing) / len(answers)


def relaxed_accuracy(prediction: str, question: Question) -> float:
    """ChartQA (arXiv 2203.10244): numbers within 5 %, words exactly; a number with commas is words, as there."""
    given = _number(prediction)
    for answer in answers_of(question):
        wanted = _number(answer)
        if given is not None and wanted is not None:
            if abs(given - wanted) <= 0.05 * abs(wanted):
                return 1.0
        elif prediction.strip().lower() == answer.strip().lower():
            return 1.0
    return 0.0


def anls(prediction: str, question: Question) -> float:
    """DocVQA (arXiv 2007.00398): 1 - normalised edit distance to the closest answer, 0 up to one half."""
    best = max(_similarity(prediction.strip().lower(), a.strip().lower()) for a in answers_of(question))
    return best if best > 0.5 else 0.0


def yes_no_f1(predictions: Sequence[str], questions: Sequence[Question]) -> float:
    """POPE (arXiv 2305.10355): F1 of yes; an answer that says neither counts as no."""
    pairs = [(is_yes(p), is_yes(q.answer)) for p, q in zip(predictions, questions, strict=True)]
    hits = sum(p and q for p, q in pairs)
    said, true = sum(p for p, _ in pairs), sum(q for _, q in pairs)
    return 2 * hits / (said + true) if said + true else 0.0


def is_yes(text: str) -> bool:
    """Whether the first word of yes and no that stands in a text is yes."""
    return _say(text) == "yes"


def _say(text: str) -> str:
    """yes, no, or nothing of the two."""
    found = re.search(r"\b(yes|no|not)\b", text.lower())
    if found is None:
        return ""
    return "yes" if found.group(1) == "yes" else "no"


_BY_ANSWER: dict[str, Callable[[str, Question], float]] = {
    "exact_match": exact_match,
    "multiple_choice": multiple_choice,
    "vqa_accuracy": vqa_accuracy,
    "relaxed_accuracy": relaxed_accuracy,
    "anls": anls,
}


def score_answers(
    metric: Metric, predictions: Sequence[str], questions: Sequence[Question]
) -> tuple[float, list[float]]:
    """The benchmark's score in 0..1, and each answer's own."""
    if metric == "yes_no_f1":
        own = [float(_say(p) == _say(q.answer)) for p, q in zip(predictions, questions, strict=True)]
        return yes_no_f1(predictions, questions), own
    own = [_BY_ANSWER[metric](p, q) for p, q in zip(predictions, questions, strict=True)]
    return sum(own) / max(1, len(own)), own


def _number(text: str) -> float | None:
    cleaned = text.strip().rstrip("%")
    try:
        return float(cleaned) / (100 if text.strip().endswith("%") else 1)
    except ValueError:
        return None


def _similarity(a: str, b: str) -> float:
    return 1 - _edit_distance(a, b) / max(len(a), len(b), 1)


def _edit_distance(a: str, b: str) -> int:
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]
