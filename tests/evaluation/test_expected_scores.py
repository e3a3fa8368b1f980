"""Expected scores from probabilities whose mean is known."""

import json

import numpy as np
import pytest

from common.evaluation.expected_scores import expected_scores


def answer(scores: list[int], overall: float, chances: dict[int, dict[int, float]]) -> tuple:
    """An answer of one token a character, whose digit number n has the probabilities ``chances[n]``."""
    dimensions = [{"name": f"D{n}", "score": score, "comment": "Of 3."} for n, score in enumerate(scores)]
    text = json.dumps({"dimensions": dimensions, "overall_score": overall})
    logs = np.full((len(text), 10), -30.0, dtype=np.float32)
    starts = [text.index('"score"', text.index(f'"D{n}"')) + 9 for n in range(len(scores))]
    for n, start in enumerate([*starts, text.index('"overall_score"') + 17]):
        for step, row in enumerate(chances.get(n, [])):
            for digit, chance in row.items():
                logs[start + step, digit] = np.log(chance)
    return text, list(text), logs


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


def test_score_that_is_no_token_of_its_own_is_left_out():
    text, pieces, logs = answer([8, 7], 8, {0: [{8: 1.0}], 1: [{7: 1.0}], 2: [{8: 1.0}]})
    at = pieces.index("8")
    joined = [*pieces[:at], "8,", *pieces[at + 2 :]]
    found = expected_scores(text, joined, np.delete(logs, at + 1, axis=0))
    assert found == {"D1": pytest.approx(7), "overall_score": pytest.approx(8)}


def test_pieces_that_are_not_the_text_give_nothing():
    text, pieces, logs = answer([8], 8, {0: [{8: 1.0}], 1: [{8: 1.0}]})
    assert expected_scores(text, pieces[:-4], logs[:-4]) == {}
    assert expected_scores("no score: 8", list("no score: 8"), np.zeros((11, 10))) == {}
