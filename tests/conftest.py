"""Fixtures that several test files share: a tiny model folder and a sample Mondrian tree, made once a session."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.sample.make_tree import make_tree

ROOT = Path(__file__).resolve().parents[1]
os.environ.pop("MONDRIAN_MAKE_VARIABLES", None)  # `make test`: what the tests start was not started by make


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


def run(script: str, *options: str, folder: Path) -> str:
    """Run one of the scripts in a folder; returns what it printed."""
    command = [sys.executable, str(ROOT / script), *options]
    offline = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=folder, env=offline, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="session")
def worked(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A sample tree of 60 photographs in which the four scripts have run as documented, and what each printed."""
    folder = tmp_path_factory.mktemp("a tree with a space") / "mondrian"
    make_tree(folder, photos=60, long_side=160)
    (folder / "even.toml").write_text(
        "[base_format]\nenabled = false\n[tuned_format]\nenabled = false\n[overhead]\nenabled = false\n"
    )
    printed = {
        "link": run("link_training_data.py", "--advisor", "ansel", folder=folder),
        "prepare": run(
            "prepare_training_data.py",
            "--manifest",
            "training_data_manifest.json",
            "--base_model",
            str(tiny_base),
            folder=folder,
        ),
        "train": run(
            "train_mlx_lora.py",
            *("--train_data", "training_data_ansel_train.json", "--base_model", str(tiny_base)),
            *("--learning_rate", "1e-2", "--batch_size", "4"),
            folder=folder,
        ),
        "evaluate": run(
            "evaluate_lora.py",
            *("--lora_path", "./models/qwen3-vl-4b-lora-ansel", "--timing_examples", "5", "--max_tokens", "16"),
            *("--gates", "even.toml"),
            folder=folder,
        ),
    }
    promote = [sys.executable, "-m", "common.release.versions", "promote", "--advisor", "ansel", "--work", str(folder)]
    done = subprocess.run(promote, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, printed | {"promote": done.stdout}
