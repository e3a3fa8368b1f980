"""Fixtures that several test files share: a tiny model folder and a sample Mondrian tree, made once a session."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.sample.make_tree import make_tree

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory):
    """Keep the bases' fingerprints (integration/lora_patch/fingerprint.py) out of the user's cache folder."""
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    yield
    os.environ.pop("XDG_CACHE_HOME") if before is None else os.environ.update(XDG_CACHE_HOME=before)


@pytest.fixture(scope="session")
def make_tiny_model():
    """A function that writes a tiny Qwen3-VL folder with the given options; returns the folder."""

    def make(folder: Path, *options: str) -> Path:
        command = [sys.executable, str(ROOT / "tests/sample/make_tiny_model.py"), "--output_dir", str(folder), *options]
        subprocess.run(command, check=True, capture_output=True, text=True)
        return folder

    return make


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory, make_tiny_model) -> Path:
    """A tiny Qwen3-VL model folder, random weights; not to be written to."""
    return make_tiny_model(tmp_path_factory.mktemp("base") / "tiny-qwen3-vl")


@pytest.fixture(scope="session")
def sample_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sample Mondrian tree with 40 photographs for ansel and the damaged jobs; not to be written to."""
    folder = tmp_path_factory.mktemp("mondrian")
    make_tree(folder, photos=40, long_side=240)
    return folder
