"""Text to tokens with the real tokenizer of Qwen3-VL.

    QWEN3_VL=path/to/Qwen3-VL-4B-Instruct python -m pytest tests/acceptance/test_real_tokenizer.py

Reads the folder's config, tokenizer and preprocessor settings; weights are not needed.
"""

import json
import os
from pathlib import Path

import mlx_vlm.models.qwen3_vl  # noqa: F401 - puts a processor without PyTorch in the place of transformers' own
import numpy as np
import pytest
from PIL import Image
from transformers import AutoProcessor

from integration.lora_patch.vlm import Base, encode, response_tokens, special_tokens

FOLDER = Path(os.environ["QWEN3_VL"])
NAMES = "<|im_end|> <|vision_start|> <|endoftext|> <|image_pad|>"
TEXT = 'Answer with JSON: {"comment":"calm, 8/10 \u00e9","overall_score":7.5}'


@pytest.fixture(scope="module")
def real() -> Base:
    config = json.loads((FOLDER / "config.json").read_text())
    return Base(None, AutoProcessor.from_pretrained(FOLDER), config, FOLDER, "real")


@pytest.mark.parametrize("prompt", [TEXT, f"{NAMES} {TEXT}", TEXT + NAMES])
@pytest.mark.parametrize("response", [TEXT, NAMES + TEXT])
def test_names_of_special_tokens_in_a_text_are_text(real, prompt, response):
    tokenizer, picture = real.processor.tokenizer, Image.new("RGB", (640, 480), "gray")
    plain, named = (encode(real, p, [picture], r) for p, r in ((TEXT, TEXT), (prompt, response)))
    for token in tokenizer.convert_tokens_to_ids(special_tokens(real)):
        assert (named.input_ids == token).sum() == (plain.input_ids == token).sum()
    assert tokenizer.decode(named.input_ids[named.completion_mask]) == response + "<|im_end|>"
    asked = tokenizer.decode(named.input_ids[~named.completion_mask])
    assert asked.endswith(f"<|vision_end|>{prompt}<|im_end|>\n<|im_start|>assistant\n")


def test_the_split_path_gives_the_tokens_of_the_plain_one(real, monkeypatch):
    """A prompt that names a special token is tokenized in three parts; any other prompt, in one. Both agree."""
    picture = Image.new("RGB", (640, 480), "gray")
    whole = encode(real, TEXT, [picture]).input_ids
    monkeypatch.setattr("integration.lora_patch.vlm.special_tokens", lambda base: ["Answer"])
    np.testing.assert_array_equal(encode(real, TEXT, [picture]).input_ids, whole)


def test_masked_spans_take_the_scores_out_of_the_loss(real):
    start = TEXT.index("7.5")
    tokens, supervised = response_tokens(real, TEXT, [(start, start + 3)])
    assert [real.processor.tokenizer.decode([t]) for t in tokens[~supervised]] == ["7", ".", "5"]
