"""Everything before the first step: the folder, the checkpoint, the rows, the layout in memory, the adapter."""

import contextlib
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import click
import mlx.core as mx

from common.errors import UserError
from common.records import software_versions
from common.training.data import DataFile, report_overlong
from common.training.distributed import Processes, is_peer_lost
from common.training.memory import Layout, is_out_of_memory, shape_of
from common.training.options import AUTO, LAYOUT, TrainingOptions
from common.training.plan import choose_layout, limit_cache
from common.training.rows import Prepared, RowMaker, RowStore
from common.training.run_folder import RunFolder, data_differences, refuse_differences
from common.training.watchdog import Watchdog
from integration.lora_patch.fingerprint import compare_fingerprints
from integration.lora_patch.memory import available_ram, find_device
from integration.lora_patch.vlm import Base

Checkpoint = tuple[Path, dict]  # its folder and its state


def open_folder(options: TrainingOptions, processes: Processes) -> tuple[RunFolder, Checkpoint | None]:
    """Return the output folder and the checkpoint to resume from; all processes get rank 0's."""
    folder = RunFolder(Path(options.output_dir), options.keep_checkpoints)

    def look() -> list | None:
        if options.plan:
            return None
        folder.mark(finished=False)
        found = folder.find_resumable(options.resume, options.overwrite)
        if options.resume and not found and not options.overwrite:
            click.echo(f"{folder.path}: no checkpoint to resume; training from the start")
        return [str(found[0]), found[1]] if found else None

    found = processes.agreed(look)
    return folder, (Path(found[0]), found[1]) if found else None


def check_resumable(
    folder: RunFolder,
    state: dict,
    differences: list[str],
    data: tuple[DataFile, DataFile | None],
    fingerprint: dict,
    processes: Processes,
) -> None:
    """UserError that names everything in which this run differs from the one whose checkpoint it would resume.

    ``differences`` are those of the options, found before.
    """
    train, val = data
    errors, warnings = compare_fingerprints(state["base_fingerprint"], fingerprint)
    differences = differences + errors + warnings  # another quantization gives other numbers too
    differences += data_differences(state["train_data"], train.record, "the training data")
    differences += data_differences(state["val_data"], val and val.record, "the validation data")
    if state["processes"] != processes.world:
        differences.append(f"there were {state['processes']} processes, now {processes.world}")
    refuse_differences(folder.path, differences)
    now = software_versions()
    changed = [f"{name} {was}, now {now.get(name)}" for name, was in state["versions"].items() if now.get(name) != was]
    if changed and processes.first:
        click.echo(f"begun with {'; '.join(changed)}: the adapter may differ in rounding", err=True)


def prepare_rows(
    options: TrainingOptions,
    base: Base,
    fingerprint: dict,
    data: tuple[DataFile, DataFile | None],
    cache: Path,
    processes: Processes,
) -> tuple[Prepared, Prepared | None]:
    """Run tokenizer and vision tower over every example once; keep the rows in memory, or in ``cache`` if many."""
    limits = {"memory": sys.maxsize, "disk": 0, AUTO: available_ram() // (4 * processes.world)}
    store = RowStore(cache, limits["memory" if options.plan else options.feature_cache])  # a plan leaves nothing behind
    everything = {**fingerprint, "name": None, "versions": software_versions()}
    maker = RowMaker(base, store, json.dumps(everything, sort_keys=True), options.max_image_size, options.longest)
    train, val = data
    quiet = not processes.first
    rows = (
        maker.prepare(train.examples, train.photos, "training photographs", quiet),
        val and maker.prepare(val.examples, val.photos, "validation photographs", quiet),
    )
    base.model.vision_tower = None  # no longer needed: its memory is free for training
    mx.clear_cache()
    return rows


def lay_out(
    options: TrainingOptions,
    base: Base,
    rows: tuple[Prepared, Prepared | None],
    saved: dict | None,
    given: set[str],
    processes: Processes,
) -> tuple[Layout, tuple[Prepared, Prepared | None]]:
    """Choose the layout that fits the device, or take the ``saved`` one; leave out what is longer than it allows."""
    train, val = rows
    if not train.examples:
        report_overlong(train, options.on_overlong, options.longest)
    device = find_device()
    shape = shape_of(base.model, options.lora_r, device.backend)
    if saved and not given & LAYOUT:
        layout = Layout(**saved)
    else:
        if saved:  # the same examples, whatever fits
            train, val = (part and part.without_overlong(saved["max_length"]) for part in (train, val))
            options = replace(options, max_seq_length=saved["max_length"])
        layout = Layout(**processes.agreed(lambda: asdict(choose_layout(options, shape, device, train, val))))
        layout = replace(layout, max_length=saved["max_length"]) if saved else layout
    if saved and layout != Layout(**saved) and processes.first:
        click.echo(
            "the layout in memory is another than before: the same training, but rounding and dropout masks differ "
            "from an uninterrupted run's",
            err=True,
        )
    train, val = (part and part.without_overlong(layout.max_length) for part in (train, val))
    for part in (train, val):
        if part is not None and processes.first:  # an empty one too
            report_overlong(part, options.on_overlong, options.longest or layout.max_length, needed=part is train)
    limit_cache(options, shape, device, layout, max(train.targets))
    return layout, (train, val)


@contextlib.contextmanager
def device_errors(watchdog: Watchdog) -> Iterator[None]:
    """Turn the device's out-of-memory error, in any form, into one line that says what to change.

    A process whose peer has ended ends too, with its last step saved.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if watchdog.processes.world > 1 and is_peer_lost(error):
            watchdog.end()
        if not is_out_of_memory(error):
            raise
        reason = (str(error) or "MemoryError").splitlines()[0]
        raise UserError(
            f"the device ran out of memory ({reason}); continue from the last checkpoint with --resume "
            "--grad_checkpointing on --micro_batch_size 1, or train again (--overwrite) with a smaller "
            "--max_seq_length or --max_image_size; --plan shows what is needed"
        ) from error
