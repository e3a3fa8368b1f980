"""PEFT and transformers read what training wrote, and answer as mlx-vlm does.

    python -m pytest --noconftest tests/peft    # or: make test-peft

Runs in a virtual environment with PyTorch; the adapter and mlx-vlm's answers come from tests/peft/reference.py,
which runs in the pipeline's own (PIPELINE_PYTHON, default .venv/bin/python).
"""

import os
import subprocess
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import Qwen3VLForConditionalGeneration

ROOT = Path(__file__).resolve().parents[2]
TOLERANCE = 2e-4  # float32 through two implementations; logits of this model are of the order of 1 to 10


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reference")
    python = os.environ.get("PIPELINE_PYTHON", str(ROOT / ".venv/bin/python"))
    subprocess.run([python, str(ROOT / "tests/peft/reference.py"), str(folder)], check=True)
    return folder


@pytest.fixture(scope="session")
def answers(made: Path) -> dict[str, np.ndarray]:
    return dict(np.load(made / "logits.npz"))


def load(folder: Path) -> torch.nn.Module:
    return Qwen3VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


def logits(model: torch.nn.Module, answers: dict[str, np.ndarray]) -> np.ndarray:
    ids = torch.from_numpy(answers["input_ids"]).long()[None]
    image = model.config.image_token_id
    with torch.no_grad():
        output = model.eval()(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=torch.from_numpy(answers["pixel_values"]),
            image_grid_thw=torch.from_numpy(answers["image_grid_thw"]).long(),
            mm_token_type_ids=(ids == image).int(),
        )
    return output.logits[0].numpy()


def test_the_base_answers_alike_in_both_worlds(made, answers):
    np.testing.assert_allclose(logits(load(made / "base"), answers), answers["base"], atol=TOLERANCE, rtol=0)


def test_peft_loads_the_adapter_and_answers_like_mlx_vlm(made, answers):
    assert np.abs(answers["tuned"] - answers["base"]).max() > 0.5  # an adapter that changes nothing would prove nothing
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        warnings.filterwarnings("ignore", message=".*ignored.*")
        model = PeftModel.from_pretrained(load(made / "base"), made / "adapter")
    adapted = [name for name, _ in model.named_modules() if name.endswith(".lora_A")]
    assert len(adapted) == 7 * model.config.text_config.num_hidden_layers and not [
        name for name in adapted if "visual" in name
    ]
    np.testing.assert_allclose(logits(model, answers), answers["tuned"], atol=TOLERANCE, rtol=0)


def test_transformers_loads_base_and_adapter_from_the_adapter_folder(made, answers):
    np.testing.assert_allclose(logits(load(made / "adapter"), answers), answers["tuned"], atol=TOLERANCE, rtol=0)


def test_peft_writes_the_same_tensors_back(made, tmp_path):
    model = PeftModel.from_pretrained(load(made / "base"), made / "adapter")
    model.save_pretrained(tmp_path)
    ours, theirs = (
        load_file(made / "adapter/adapter_model.safetensors"),
        load_file(tmp_path / "adapter_model.safetensors"),
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_merging_in_peft_gives_the_fused_model(made, answers):
    merged = PeftModel.from_pretrained(load(made / "base"), made / "adapter").merge_and_unload()
    fused = load(made / "merged")
    np.testing.assert_allclose(logits(merged, answers), answers["tuned"], atol=TOLERANCE, rtol=0)
    np.testing.assert_allclose(logits(fused, answers), answers["merged"], atol=TOLERANCE, rtol=0)
    ours, theirs = fused.state_dict(), merged.state_dict()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-6, rtol=1e-5)
