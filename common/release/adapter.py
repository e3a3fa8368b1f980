"""Adapter folders: check one, convert it to the form that PEFT (hence vLLM) and mlx-vlm both read, or fuse it.

    python -m common.release.adapter check models/qwen3-vl-4b-lora-ansel
    python -m common.release.adapter convert --lora_path FOLDER --output_dir BOTH
    python -m common.release.adapter fuse --base_model FOLDER --lora_path FOLDER --output_dir MERGED [--dequantize]

`convert` takes a folder that has the weight file of one of the two and writes both; `fuse` merges the adapter into a
base model, for servers that take no adapter.
"""

from pathlib import Path

import click

from common.cli import PATH, ScriptCommand, option
from common.errors import UserError
from common.release.fuse import fuse_adapter
from common.training.adapter_files import adapter_config, write_adapter
from integration.lora_patch.adapters import as_uniform, read_adapter
from integration.lora_patch.sources import adapter_in
from integration.lora_patch.versions import MLX_WEIGHTS, PEFT_WEIGHTS


@click.group(help=__doc__.split("\n\n")[0])
def main() -> None:
    pass


lora_scale_option = option(
    "--lora_scale", type=float, help="scale of an adapter of an older mlx-vlm, whose files do not tell it"
)


@main.command(cls=ScriptCommand)
@click.argument("lora_path", type=PATH)
@lora_scale_option
def check(lora_path: Path, lora_scale: float | None) -> None:
    """Say what is in an adapter folder; exit 1 when it is not whole."""
    adapter = read_adapter(adapter_in(lora_path), lora_scale)
    both = [name for name in (PEFT_WEIGHTS, MLX_WEIGHTS) if (lora_path / name).is_file()]
    ranks, scales = ({*values} for values in (adapter.ranks, (scale for _, _, scale in adapter.layers.values())))
    click.echo(
        f"{lora_path}: rank {_listed(ranks)}, scale {_listed(scales)}, {len(adapter.layers)} modules, "
        f"{sum(a.size + b.size for a, b, _ in adapter.layers.values()):,} parameters, "
        + ("for PEFT and mlx-vlm alike" if len(both) == 2 else "for one of PEFT and mlx-vlm alone (see convert)")
    )


def _listed(values: set[float]) -> str:
    return ", ".join(f"{value:g}" for value in sorted(values))


@main.command(cls=ScriptCommand)
@option("--lora_path", type=PATH, required=True, help="adapter of PEFT or of mlx-vlm")
@option("--output_dir", type=PATH, required=True, help="folder for both; must be new")
@lora_scale_option
def convert(lora_path: Path, output_dir: Path, lora_scale: float | None) -> None:
    """Write an adapter made for PEFT or for mlx-vlm alone in the form that both read."""
    adapter = read_adapter(adapter_in(lora_path), lora_scale)
    tensors, rank, scale = as_uniform(adapter.layers)
    if output_dir.exists() and any(output_dir.iterdir()):
        raise UserError(f"{output_dir}: not empty; name a new folder")
    own = adapter.config.get("lora_parameters") or {}
    modules = sorted({name.rpartition(".")[0] for name in tensors})
    dropout = adapter.config.get("lora_dropout", own.get("dropout", 0.0))
    config = adapter_config(adapter.config.get("base_model_name_or_path") or "", modules, rank, scale * rank, dropout)
    write_adapter(output_dir, tensors, config)
    click.echo(f"{output_dir}: {len(tensors) // 2} modules, for PEFT and mlx-vlm alike")


@main.command(cls=ScriptCommand)
@option("--base_model", required=True, help="folder or hub id of the base that the adapter was trained on")
@option("--lora_path", type=PATH, required=True, help="adapter folder")
@option("--output_dir", type=PATH, required=True, help="folder for the model; must be new")
@option("--dequantize", is_flag=True, help="write a quantized base as 16-bit weights, which loses nothing")
def fuse(base_model: str, lora_path: Path, output_dir: Path, dequantize: bool) -> None:
    """Merge an adapter into its base model, for serving without an adapter."""
    for line in fuse_adapter(base_model, lora_path, output_dir, dequantize):
        click.echo(line)


if __name__ == "__main__":
    main()
