"""Each metric by a table of answers."""

from __future__ import annotations

import pytest

from sailvl_trainer.evaluate import scoring
from sailvl_trainer.evaluate.tsv import Question


def ask(answer: str, **choices: str) -> Question:
    return Question(index="0", images=(), question="?", answer=answer, choices=choices)


CASES = [
    pytest.param(scoring.exact_match, "The Red.", ask("red"), 1.0, id="articles and case don't count"),
    pytest.param(scoring.exact_match, "two", ask("2"), 1.0, id="numbers as words"),
    pytest.param(scoring.exact_match, "reddish", ask("red"), 0.0, id="a part is not the whole"),
    pytest.param(scoring.exact_match, "b", ask("['a', 'b']"), 1.0, id="any of several"),
    pytest.param(scoring.multiple_choice, "B", ask("B", A="cat", B="dog"), 1.0, id="a letter"),
    pytest.param(scoring.multiple_choice, "The answer is (B).", ask("B", A="cat", B="dog"), 1.0, id="in brackets"),
    pytest.param(scoring.multiple_choice, "a dog", ask("B", A="cat", B="dog"), 1.0, id="its text"),
    pytest.param(scoring.multiple_choice, "A or B", ask("B", A="cat", B="dog"), 0.0, id="two letters mean none"),
    pytest.param(scoring.multiple_choice, "b)", ask("B", A="cat", B="dog"), 1.0, id="a small letter"),
    pytest.param(scoring.multiple_choice, "A dog", ask("B", A="cat", B="dog"), 1.0, id="an article is no letter"),
    pytest.param(scoring.multiple_choice, "A cat", ask("A", A="cat", B="dog"), 1.0, id="an article before the text"),
    pytest.param(scoring.multiple_choice, "C", ask("B", A="cat", B="dog"), 0.0, id="a letter that is none"),
    pytest.param(scoring.multiple_choice, "dark red", ask("B", A="red", B="dark red"), 1.0, id="the longer text"),
    pytest.param(scoring.multiple_choice, "It is -5.", ask("B", A="5", B="-5"), 1.0, id="a sign"),
    pytest.param(scoring.multiple_choice, "cats and dogs", ask("A", A="cat", B="dog"), 0.0, id="whole words"),
    pytest.param(scoring.multiple_choice, "cat or dog", ask("A", A="cat", B="dog"), 0.0, id="two texts mean none"),
    pytest.param(scoring.exact_match, "", ask("a"), 0.0, id="nothing isn't an article"),
    pytest.param(scoring.exact_match, "dont", ask("Don't"), 1.0, id="apostrophes"),
    pytest.param(scoring.exact_match, "[0, 2, 4]", ask("[0, 2, 4]"), 1.0, id="a list of numbers is one answer"),
    pytest.param(scoring.relaxed_accuracy, "1,000", ask("1000"), 0.0, id="commas as in the reference"),
    pytest.param(scoring.anls, "ab", ask("abcd"), 0.0, id="exactly one half"),
    pytest.param(scoring.vqa_accuracy, "red", ask(str(["red"] * 3 + ["blue"] * 7)), 0.9, id="three of ten agree"),
    pytest.param(scoring.vqa_accuracy, "red", ask(str(["red"] + ["blue"] * 9)), 0.3, id="one of ten agrees"),
    pytest.param(scoring.vqa_accuracy, "red", ask(str(["red"] * 10)), 1.0, id="all agree"),
    pytest.param(scoring.relaxed_accuracy, "104", ask("100"), 1.0, id="within five percent"),
    pytest.param(scoring.relaxed_accuracy, "106", ask("100"), 0.0, id="beyond five percent"),
    pytest.param(scoring.relaxed_accuracy, "25%", ask("0.25"), 1.0, id="percent"),
    pytest.param(scoring.relaxed_accuracy, "Blue", ask("blue"), 1.0, id="words"),
    pytest.param(scoring.anls, "invoice 12", ask("invoice 13"), 0.9, id="one of ten letters off"),
    pytest.param(scoring.anls, "x", ask("invoice"), 0.0, id="below one half is nothing"),
]


@pytest.mark.parametrize(("metric", "prediction", "question", "score"), CASES)
def test_metric(metric: object, prediction: str, question: Question, score: float) -> None:
    assert metric(prediction, question) == pytest.approx(score)  # type: ignore[operator]


def test_yes_no_f1() -> None:
    questions = [ask("yes"), ask("yes"), ask("no"), ask("no")]
    assert scoring.yes_no_f1(["Yes.", "no", "yes", "No, it is not"], questions) == pytest.approx(0.5)
    assert scoring.yes_no_f1(["no"] * 4, questions) == 0.0
    assert scoring.score_answers("yes_no_f1", ["", "", "", "no"], questions)[1] == [0, 0, 0, 1], "silence is no no"
