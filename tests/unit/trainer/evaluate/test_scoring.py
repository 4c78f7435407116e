"""Tests of each metric with a table of answers."""

from __future__ import annotations

import pytest

from sailvl_trainer.evaluate import scoring
from sailvl_trainer.evaluate.tsv import Question


def build_question(answer: str, **choices: str) -> Question:
    return Question(index="0", images=(), question="?", answer=answer, choices=choices)


CASES = [
    pytest.param(scoring.exact_match, "The Red.", build_question("red"), 1.0, id="articles and case are ignored"),
    pytest.param(scoring.exact_match, "two", build_question("2"), 1.0, id="number word"),
    pytest.param(scoring.exact_match, "reddish", build_question("red"), 0.0, id="substring is no match"),
    pytest.param(scoring.exact_match, "b", build_question("['a', 'b']"), 1.0, id="one of several answers"),
    pytest.param(scoring.multiple_choice, "B", build_question("B", A="cat", B="dog"), 1.0, id="letter"),
    pytest.param(
        scoring.multiple_choice,
        "The answer is (B).",
        build_question("B", A="cat", B="dog"),
        1.0,
        id="letter in brackets",
    ),
    pytest.param(scoring.multiple_choice, "a dog", build_question("B", A="cat", B="dog"), 1.0, id="text of the choice"),
    pytest.param(
        scoring.multiple_choice, "A or B", build_question("B", A="cat", B="dog"), 0.0, id="two letters are ambiguous"
    ),
    pytest.param(scoring.multiple_choice, "b)", build_question("B", A="cat", B="dog"), 1.0, id="lower-case letter"),
    pytest.param(
        scoring.multiple_choice, "A dog", build_question("B", A="cat", B="dog"), 1.0, id="article is not a letter"
    ),
    pytest.param(
        scoring.multiple_choice, "A cat", build_question("A", A="cat", B="dog"), 1.0, id="article before the text"
    ),
    pytest.param(scoring.multiple_choice, "C", build_question("B", A="cat", B="dog"), 0.0, id="letter of no choice"),
    pytest.param(
        scoring.multiple_choice,
        "dark red",
        build_question("B", A="red", B="dark red"),
        1.0,
        id="longer of two contained texts",
    ),
    pytest.param(scoring.multiple_choice, "It is -5.", build_question("B", A="5", B="-5"), 1.0, id="minus sign"),
    pytest.param(
        scoring.multiple_choice, "cats and dogs", build_question("A", A="cat", B="dog"), 0.0, id="whole words"
    ),
    pytest.param(
        scoring.multiple_choice, "cat or dog", build_question("A", A="cat", B="dog"), 0.0, id="two texts are ambiguous"
    ),
    pytest.param(scoring.exact_match, "", build_question("a"), 0.0, id="empty prediction"),
    pytest.param(scoring.exact_match, "dont", build_question("Don't"), 1.0, id="apostrophes"),
    pytest.param(
        scoring.exact_match, "[0, 2, 4]", build_question("[0, 2, 4]"), 1.0, id="list of numbers is one answer"
    ),
    pytest.param(scoring.relaxed_accuracy, "1,000", build_question("1000"), 0.0, id="commas as in the reference"),
    pytest.param(scoring.anls, "ab", build_question("abcd"), 0.0, id="exactly one half"),
    pytest.param(
        scoring.vqa_accuracy, "red", build_question(str(["red"] * 3 + ["blue"] * 7)), 0.9, id="three of ten agree"
    ),
    pytest.param(scoring.vqa_accuracy, "red", build_question(str(["red"] + ["blue"] * 9)), 0.3, id="one of ten agrees"),
    pytest.param(scoring.vqa_accuracy, "red", build_question(str(["red"] * 10)), 1.0, id="all agree"),
    pytest.param(scoring.relaxed_accuracy, "104", build_question("100"), 1.0, id="within five percent"),
    pytest.param(scoring.relaxed_accuracy, "106", build_question("100"), 0.0, id="beyond five percent"),
    pytest.param(scoring.relaxed_accuracy, "25%", build_question("0.25"), 1.0, id="percent"),
    pytest.param(scoring.relaxed_accuracy, "Blue", build_question("blue"), 1.0, id="text"),
    pytest.param(scoring.anls, "invoice 12", build_question("invoice 13"), 0.9, id="one of ten characters differs"),
    pytest.param(scoring.anls, "x", build_question("invoice"), 0.0, id="below one half"),
]


@pytest.mark.parametrize(("metric", "prediction", "question", "score"), CASES)
def test_metric_scores_a_prediction(metric: object, prediction: str, question: Question, score: float) -> None:
    assert metric(prediction, question) == pytest.approx(score)  # type: ignore[operator]


def test_yes_no_f1_counts_missing_answers_as_no() -> None:
    questions = [build_question("yes"), build_question("yes"), build_question("no"), build_question("no")]
    assert scoring.yes_no_f1(["Yes.", "no", "yes", "No, it is not"], questions) == pytest.approx(0.5)
    assert scoring.yes_no_f1(["no"] * 4, questions) == 0.0
    assert scoring.score_answers("yes_no_f1", ["", "", "", "no"], questions)[1] == [0, 0, 0, 1], (
        "an empty answer is not a no"
    )
