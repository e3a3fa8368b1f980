"""The split: no leak, the right share, the same side for ever."""

import random

import pytest

from common.data.near_duplicates import thumb_of
from common.data.split import SplitRecord, assign, settle
from common.errors import UserError
from common.files import write_json
from tests.mondrian_case import picture


def groups_of(count: int, start: int = 0) -> list[list[str]]:
    return [[f"{i:04d}"] for i in range(start, start + count)]


@pytest.mark.parametrize(("count", "val"), [(2, 1), (3, 1), (5, 1), (8, 2), (10, 2), (60, 12), (101, 20), (1000, 200)])
def test_the_share_is_exact(count, val):
    sides = assign(groups_of(count), [5.0] * count, {}, 0.2, 42)
    assert sides.count("val") == val


def test_scores_are_spread_alike():
    scores = [1 + 9 * i / 1000 for i in range(1000)]
    sides = assign(groups_of(1000), scores, {}, 0.2, 42)
    for low in range(2, 20):
        stratum = [side for side, score in zip(sides, scores, strict=True) if low / 2 <= score < (low + 1) / 2]
        assert abs(stratum.count("val") - 0.2 * len(stratum)) < 1
    other = assign(groups_of(1000), scores, {}, 0.2, 7)
    assert sides != other and sides == assign(groups_of(1000), scores, {}, 0.2, 42)


def test_few_photographs_move_even_where_the_record_is_lost():
    rng = random.Random(0)
    scores = [rng.gauss(6, 1.5) for _ in range(400)]
    before = assign(groups_of(300), scores[:300], {}, 0.2, 42)
    after = assign(groups_of(400), scores, {}, 0.2, 42)
    assert sum(one != other for one, other in zip(before, after, strict=False)) <= 0.05 * 300


def test_known_photographs_keep_their_side_whatever_comes():
    rng = random.Random(0)
    known: dict[str, str] = {}
    for count in (5, 6, 7, 20, 21, 60, 300):
        groups = groups_of(count)
        sides = assign(groups, [rng.uniform(1, 10) for _ in groups], known, 0.2, 42)
        assert all(known.get(group[0], side) == side for group, side in zip(groups, sides, strict=True))
        assert abs(sides.count("val") - 0.2 * count) <= 1
        known.update({group[0]: side for group, side in zip(groups, sides, strict=True)})


def test_one_photograph_cannot_be_split():
    with pytest.raises(UserError, match="at least 2"):
        assign(groups_of(1), [5.0], {}, 0.2, 42)
    with pytest.raises(UserError, match="none for training"):
        assign(groups_of(2), [5.0, 6.0], {"0000": "val", "0001": "val"}, 0.2, 42)


def test_a_near_duplicate_of_a_known_photograph_takes_its_side():
    groups = [["a", "new"], ["b"], ["c"]]
    assert assign(groups, [5, 5, 5], {"a": "val", "b": "train", "c": "train"}, 0.2, 42) == ["val", "train", "train"]


def test_new_photographs_that_tie_the_sides_are_left_out():
    known = {"a": "train", "b": "val"}
    groups, left_out = settle([["a", "b", "n1", "n2"], ["c"]], known, lambda one, other: False)
    assert groups == [["a"], ["b"], ["c"]]
    assert left_out == {"n1": "ties_sides", "n2": "ties_sides"}


def test_train_gives_way_where_known_photographs_are_near():
    known = {"a": "train", "b": "val", "d": "train"}
    groups, left_out = settle([["a", "b", "d"]], known, lambda one, other: {one, other} == {"a", "b"})
    assert groups == [["d"], ["b"]]
    assert left_out == {"a": "near_validation"}


def test_the_record_comes_back_and_damage_is_told(tmp_path):
    thumb = thumb_of(picture(1))
    record = SplitRecord(42, 0.2, {"b": "val", "a": "train", "gone": "val"}, {"a": thumb, "b": thumb})
    path = tmp_path / "split.json"
    write_json(path, record.to_dict())
    assert SplitRecord.read(path) == record
    assert SplitRecord.read(tmp_path / "none.json") is None
    path.write_text('{"photographs": {"a": {"side": "test"}}, "seed": 1, "val_split": 0.2}')
    with pytest.raises(UserError, match="restore it, or split again with --resplit"):
        SplitRecord.read(path)
    path.write_text('{"photographs": {"a"')
    with pytest.raises(UserError, match="not valid JSON.*; restore the split record, or split anew with --resplit"):
        SplitRecord.read(path)
