"""Adapter folders: check one, convert it to the form that PEFT (hence vLLM) and mlx-vlm both read, or fuse it.

    python -m common.release.adapter check models/qwen3-vl-4b-lora-ansel
    python -m common.release.adapter convert --lora_path FOLDER --output_dir BOTH
    python -m common.release.adapter fuse --base_model FOLDER --lora_path FOLDER --output_dir MERGED [--dequantize]

`convert` takes a folder that has the weight file of one of the two and writes both; `fuse` merges the adapter into a
base model, for servers that take no adapter.
"""

from pathlib import Path

import click

from common.cli import ScriptCommand
from common.errors import UserError
from common.release.fuse import fuse_adapter
from common.training.adapter_files import read_adapter, write_adapter
from integration.lora_patch.versions import MLX_WEIGHTS, PEFT_WEIGHTS


@click.group(help=__doc__.split("\n\n")[0])
def main() -> None:
    pass


@main.command(cls=ScriptCommand)
@click.argument("lora_path", type=click.Path(path_type=Path))
def check(lora_path: Path) -> None:
    """Say what is in an adapter folder; exit 1 when it is not whole."""
    tensors, config = read_adapter(lora_path)
    modules = config["lora_parameters"]["keys"]
    missing = [name for name in (PEFT_WEIGHTS, MLX_WEIGHTS) if not (lora_path / name).is_file()]
    click.echo(
        f"{lora_path}: rank {config['r']}, scale {config['lora_parameters']['scale']:g}, {len(modules)} modules, "
        f"{sum(tensor.size for tensor in tensors.values()):,} parameters, "
        + (f"without {missing[0]} (see convert)" if missing else "for PEFT and mlx-vlm alike")
    )


@main.command(cls=ScriptCommand)
@click.option("--lora_path", type=click.Path(path_type=Path), required=True, help="adapter of PEFT or of mlx-vlm")
@click.option("--output_dir", type=click.Path(path_type=Path), required=True, help="folder for both; must be new")
def convert(lora_path: Path, output_dir: Path) -> None:
    """Write an adapter made for PEFT or for mlx-vlm alone in the form that both read."""
    tensors, config = read_adapter(lora_path)
    if output_dir.exists() and any(output_dir.iterdir()):
        raise UserError(f"{output_dir}: not empty; name a new folder")
    write_adapter(output_dir, tensors, config)
    click.echo(f"{output_dir}: {len(tensors) // 2} modules, for PEFT and mlx-vlm alike")


@main.command(cls=ScriptCommand)
@click.option("--base_model", required=True, help="folder or hub id of the base that the adapter was trained on")
@click.option("--lora_path", type=click.Path(path_type=Path), required=True, help="adapter folder")
@click.option("--output_dir", type=click.Path(path_type=Path), required=True, help="folder for the model; must be new")
@click.option("--dequantize", is_flag=True, help="write a quantized base as 16-bit weights, which loses nothing")
def fuse(base_model: str, lora_path: Path, output_dir: Path, dequantize: bool) -> None:
    """Merge an adapter into its base model, for serving without an adapter."""
    for line in fuse_adapter(base_model, lora_path, output_dir, dequantize):
        click.echo(line)


if __name__ == "__main__":
    main()
