"""Make a tiny Qwen3-VL: the real model class and file layout at a size that two CPU cores train in seconds.

    python tests/sample/make_tiny_model.py --output_dir demo/base

Writes config.json, model.safetensors (float32, the tensor names of Qwen/Qwen3-VL-4B-Instruct), a byte-level BPE
tokenizer trained on the sample's own text with Qwen's special tokens, Qwen3-VL's chat template in short, and the
processor's settings. mlx_vlm.load() and transformers' Qwen3VLForConditionalGeneration both read the folder.
Reads nothing. The same options give the same files on the same machine.
"""

import json
import random
import sys
from dataclasses import replace
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)] if str(ROOT) not in sys.path else []

from tests.sample import scenes  # noqa: E402
from tests.sample.make_tree import ADVISORS, sample_prompt  # noqa: E402

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)

CHAT_TEMPLATE = """\
{%- macro parts(content) -%}
  {%- if content is string -%}{{- content -}}
  {%- else -%}
    {%- for item in content -%}
      {%- if item.type == 'image' or 'image' in item or 'image_url' in item -%}
        {{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
      {%- elif item.type == 'video' or 'video' in item -%}
        {{- '<|vision_start|><|video_pad|><|vision_end|>' -}}
      {%- elif 'text' in item -%}
        {{- item.text -}}
      {%- endif -%}
    {%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
{%- for message in messages -%}
  {{- '<|im_start|>' + message.role + '\\n' + parts(message.content) + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


@click.command()
@click.option("--output_dir", type=click.Path(path_type=Path), required=True, help="Folder to write the model to.")
@click.option("--seed", default=0, show_default=True, help="Seed of the weights.")
@click.option("--pretrain_steps", default=0, show_default=True, help="Steps of pre-training; 0 leaves random weights.")
@click.option("--pretrain_seconds", default=120.0, show_default=True, help="Stop pre-training after so long.")
@click.option("--vocab_size", default=2048, show_default=True, help="Tokens of the tokenizer, special tokens included.")
def main(output_dir: Path, seed: int, pretrain_steps: int, pretrain_seconds: float, vocab_size: int) -> None:
    """Make a tiny Qwen3-VL model folder."""
    output_dir.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(vocab_size)
    write_tokenizer(output_dir, tokenizer)
    config = write_configs(output_dir, tokenizer)
    model = random_model(config, seed)
    if pretrain_steps:
        from mlx_vlm.utils import load_processor

        from tests.sample.pretraining import pretrain

        pretrain(model, load_processor(output_dir), config, pretrain_steps, pretrain_seconds, seed)
    save_weights(output_dir, model)
    click.echo(
        f"tiny Qwen3-VL: {count_parameters(model):,} parameters, {tokenizer.get_vocab_size()} tokens -> {output_dir}"
    )


def corpus() -> list[str]:
    """Text for the tokenizer: the prompts, and for random scenes what the sample's critics say of them."""
    from tests.sample.pretraining import MEASURE_PROMPT, RECALL_PROMPT, generic_critique, measurement

    rng = random.Random(1)
    texts = [sample_prompt(advisor) for advisor in ADVISORS] * 40 + [MEASURE_PROMPT, RECALL_PROMPT] * 100
    for _ in range(300):
        # qualities drawn apart from one another, so that every sentence is met often enough to become a token
        scene = replace(scenes.random_scene(rng), light=rng.random(), sharp=rng.random(), color=rng.random())
        texts.append(json.dumps(scenes.critique(scene), ensure_ascii=False, separators=(",", ":")))
        texts += [generic_critique(scene), measurement(scene)]
    return texts


def train_tokenizer(vocab_size: int):
    """A byte-level BPE over whole sentences: scores stand alone, everything else may merge across words.

    Merging across words makes a prompt of two thousand characters and an answer of the same length about a hundred
    tokens each, which is what lets two CPU cores train in seconds. Any other text falls back to shorter pieces,
    in the end to single bytes.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d\.\d|\d|[^\d]{1,400}"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return tokenizer


def write_tokenizer(folder: Path, tokenizer) -> None:
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "processor_class": "Qwen3VLProcessor",
            "bos_token": None,
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
            "clean_up_tokenization_spaces": False,
            "model_max_length": 32768,
        },
    )
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    write_json(folder / "chat_template.json", {"chat_template": CHAT_TEMPLATE})


def write_configs(folder: Path, tokenizer) -> dict:
    """Write config.json and the settings beside it; returns the config."""
    ids = {token: tokenizer.token_to_id(token) for token in SPECIAL_TOKENS}
    config = {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "model_type": "qwen3_vl",
        "dtype": "float32",
        "tie_word_embeddings": True,
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "text_config": {
            "model_type": "qwen3_vl_text",
            "dtype": "float32",
            "vocab_size": tokenizer.get_vocab_size(),
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 64,
            "hidden_act": "silu",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "initializer_range": 0.02,
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-06,
            "rope_theta": 5000000,
            "rope_scaling": {"mrope_interleaved": True, "mrope_section": [12, 10, 10], "rope_type": "default"},
            "tie_word_embeddings": True,
            "use_cache": True,
            "bos_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids["<|im_end|>"],
        },
        "vision_config": {
            "model_type": "qwen3_vl",
            "dtype": "float32",
            "depth": 2,
            "deepstack_visual_indexes": [0, 1],
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_size": 64,
            "in_channels": 3,
            "initializer_range": 0.02,
            "intermediate_size": 128,
            "num_heads": 2,
            "num_position_embeddings": 64,
            "out_hidden_size": 128,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
    }
    write_json(folder / "config.json", config)
    write_json(
        folder / "generation_config.json",
        {
            "bos_token_id": ids["<|endoftext|>"],
            "pad_token_id": ids["<|endoftext|>"],
            "eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]],
            "do_sample": True,
            "temperature": 0.7,
            "top_k": 20,
            "top_p": 0.8,
        },
    )
    # photographs shrink to at most 128 x 128 pixels, so 16 image tokens at most
    image = {
        "size": {"shortest_edge": 32 * 32, "longest_edge": 96 * 96},
        "patch_size": 16,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "processor_class": "Qwen3VLProcessor",
    }
    write_json(folder / "preprocessor_config.json", {**image, "image_processor_type": "Qwen2VLImageProcessorFast"})
    write_json(folder / "video_preprocessor_config.json", {**image, "video_processor_type": "Qwen3VLVideoProcessor"})
    return config


def random_model(config: dict, seed: int):
    """mlx-vlm's Qwen3-VL of this config with random weights.

    Norm weights are drawn about 1, not set to it: a trained model's differ, and the base's fingerprint is made of them.
    """
    import mlx.core as mx
    from mlx.utils import tree_flatten, tree_unflatten
    from mlx_vlm.models.qwen3_vl import Model, ModelConfig, TextConfig, VisionConfig

    parts = {
        "text_config": TextConfig.from_dict(json.loads(json.dumps(config["text_config"]))),
        "vision_config": VisionConfig.from_dict(config["vision_config"]),
    }
    mx.random.seed(seed)
    model = Model(ModelConfig.from_dict({**config, **parts}))
    norms = {
        name: weight + 0.05 * mx.random.normal(weight.shape)
        for name, weight in tree_flatten(model.parameters())
        if "norm" in name and name.endswith(".weight")
    }
    model.update(tree_unflatten(list(norms.items())))
    mx.eval(model.parameters())
    return model


def save_weights(folder: Path, model) -> None:
    """Write model.safetensors under Hugging Face's names and layouts."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    weights = {}
    for name, weight in tree_flatten(model.parameters()):
        name = name.replace("language_model.model.", "model.language_model.").replace("vision_tower.", "model.visual.")
        if name == "model.visual.patch_embed.proj.weight":
            weight = weight.transpose(0, 4, 1, 2, 3)  # channels last -> channels first
        weights[name] = weight
    # last of all, whole or not at all: the folder counts as made when this file is there
    mx.save_safetensors(str(folder / "unfinished.safetensors"), weights, metadata={"format": "pt"})
    (folder / "unfinished.safetensors").replace(folder / "model.safetensors")


def count_parameters(model) -> int:
    from mlx.utils import tree_flatten

    return sum(weight.size for _, weight in tree_flatten(model.parameters()))


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
