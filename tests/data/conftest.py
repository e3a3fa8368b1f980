"""For the tests of linking: a Mondrian tree with one photograph."""

from pathlib import Path

import pytest

from tests.mondrian_case import Tree


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    tree = Tree(tmp_path)
    tree.photo("photo.jpg", 1)
    return tree
