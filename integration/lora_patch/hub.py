"""Where a base model's files are: a folder, or a model of the Hugging Face hub, by the same rule everywhere."""

from pathlib import Path

from .errors import LoraError

DEFAULT_BASE = "Qwen/Qwen3-VL-4B-Instruct"
FILES = ["*.json", "*.safetensors", "*.txt", "*.jinja", "*.model"]  # what a model folder needs; no PyTorch weights


def model_folder(name: str | Path, download: bool = True) -> Path:
    """Return the folder of a model: the folder ``name``, or the local copy of the hub's model ``name``.

    What the hub's cache lacks is fetched if ``download``. Raises LoraError for a name that is neither.
    """
    name = str(name)
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists() or name.startswith(("/", ".", "~")) or name.count("/") != 1:
        raise LoraError(f"{name}: no model folder there; name a folder with config.json and weights, or a hub id")
    from huggingface_hub import snapshot_download  # imported here: a local folder never needs the hub

    try:
        return Path(snapshot_download(name, allow_patterns=FILES, local_files_only=not download))
    except Exception as error:  # the hub client raises a dozen unrelated types; all mean that it cannot be had
        where = "a model the hub gives" if download else "a model in the hub's cache"
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise LoraError(f"{name}: neither a folder here nor {where}: {reason}") from error


def local_file(name: str, file: str) -> Path | None:
    """Return ``file`` of a model folder or of the hub's cache, without the network; None if it is not here."""
    if Path(name).expanduser().is_dir():
        path = Path(name).expanduser() / file
        return path if path.is_file() else None
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(name, file)
    except ValueError:  # neither a folder nor a hub id
        return None
    return Path(found) if isinstance(found, str) else None
