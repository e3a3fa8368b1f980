"""Expected scores from probabilities whose mean is known."""

import json

import numpy as np
import pytest

from common.evaluation.expected_scores import expected_scores


def answer(scores: list[int], overall: float, chances: dict[int, dict[int, float]]) -> tuple:
    """An answer of one token a character, whose digit number n has the probabilities ``chances[n]``."""
    dimensions = [{"name": f"D{n}", "score": score, "comment": "Of 3."} for n, score in enumerate(scores)]
    text = json.dumps({"dimensions": dimensions, "overall_score": overall})
    digits = [int(letter) if letter.isdigit() else None for letter in text]
    logs = np.full((len(text), 10), -30.0, dtype=np.float32)
    starts = [text.index('"score"', text.index(f'"D{n}"')) + 9 for n in range(len(scores))]
    for n, start in enumerate([*starts, text.index('"overall_score"') + 17]):
        for step, row in enumerate(chances.get(n, [])):
            for digit, chance in row.items():
                logs[start + step, digit] = np.log(chance)
    return text, digits, logs


def test_mean_of_the_digits_probabilities():
    found = expected_scores(*answer([8, 6], 7.5, {0: [{8: 0.6, 7: 0.3}], 1: [{6: 1.0}], 2: [{7: 1.0}, {}, {5: 1.0}]}))
    assert found == {
        "D0": pytest.approx((8 * 0.6 + 7 * 0.3) / 0.9),
        "D1": pytest.approx(6),
        "overall_score": pytest.approx(7.5),
    }


def test_ten_is_a_one_with_a_nought():
    ten = [{1: 0.5, 9: 0.5}, {0: 0.8}]
    found = expected_scores(*answer([10, 9], 9, {0: ten, 1: [{9: 0.75, 1: 0.25}], 2: [{9: 1.0}]}))
    assert found["D0"] == pytest.approx(0.5 * (10 * 0.8 + 1 * 0.2) + 0.5 * 9)
    assert found["D1"] == pytest.approx(0.75 * 9 + 0.25 * 10)


def test_tokens_of_several_digits_give_nothing():
    text, digits, logs = answer([8], 8, {0: [{8: 1.0}], 1: [{8: 1.0}]})
    digits[digits.index(8)] = None
    assert expected_scores(text, digits, logs) == {}


def test_answer_without_scores_gives_nothing():
    assert expected_scores("no score: 8", [None] * 10 + [8], np.zeros((11, 10))) == {}
