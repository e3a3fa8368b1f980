"""A bounded piece of `tests.fuzz.fuzz` in every run of the tests; the whole of it runs from the command line."""

from tests.fuzz.fuzz import fuzz_databases, fuzz_parsers, fuzz_rows, seeds


def test_mutated_answers_and_prompts():
    tried, _ = fuzz_parsers(seeds(None), seed=7, count=None, seconds=20)
    assert tried > 500


def test_databases_with_flipped_bytes(tmp_path):
    codes = fuzz_databases(tmp_path, seed=7, count=20)
    assert codes[0] and codes[1]  # some are read all the same, some refused


def test_hand_damaged_rows(tmp_path):
    for name, codes in fuzz_rows(tmp_path, seed=7, count=15).items():
        assert codes[1], name
