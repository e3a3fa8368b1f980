"""The commands `install`, `check` and `report`; each imports what it needs, so that all start fast."""

import argparse
import json
import sys
from pathlib import Path

from .errors import LoraError, one_line
from .files import write_file
from .flags import schedule
from .source_file import Refusal


def check_adapters(given: argparse.Namespace) -> None:
    """Print what the service would serve; LoraError for what it would refuse."""
    from .adapters import read_adapter  # MLX: slow to import
    from .base import check_base, read_base
    from .sources import EVERYONE, find_sources, unpromoted

    sources, _ = find_sources(given.lora_path, given.model_config)
    base = read_base(given.base_model) if given.base_model else None
    if given.base_model and base is None:
        raise LoraError(f"{given.base_model}: neither a model folder nor a model in the hub's cache")
    for advisor, source in sources.items():
        adapter = read_adapter(source, given.lora_scale)
        warnings_ = check_base(adapter, base) if given.base_model else []
        who = "every advisor" if advisor == EVERYONE else advisor
        ranks = ", ".join(map(str, adapter.ranks))
        base_name = (adapter.trained_on or {}).get("name") or adapter.config.get("base_model_name_or_path")
        print(f"{who}: {adapter.path}, {adapter.version}, rank {ranks}, {len(adapter.layers)} modules, "
              f"{adapter.nbytes / 1e6:.1f} MB, base {base_name or 'unknown'}")  # fmt: skip
        for warning in warnings_:
            print(f"warning: {warning}")
    waiting = unpromoted(Path(given.lora_path).expanduser()) if given.lora_path else []
    for advisor in waiting:
        print(f"{advisor}: no version was put in use (no deployed.json), the base answers")
    if not sources and not waiting:
        print("no adapter: the base answers everything")


def report_arms(given: argparse.Namespace) -> None:
    """Write the A/B report, or watch the running test until it has an answer."""
    from .report import as_table, make_report, watch
    from .report_jobs import read_jobs
    from .report_page import as_html

    if given.watch is not None:
        sys.exit(watch(given.db, given.watch, given.schedule))
    report = make_report(read_jobs(given.db), given.days, given.schedule)
    forms = {"table": as_table, "html": as_html, "json": lambda found: json.dumps(found, indent=2)}
    shown = forms[given.format](report)
    if given.output:
        write_file(given.output, shown.encode() + b"\n")
    else:
        print(shown)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="lora_patch", description="Serve LoRA adapters from ai_advisor_service.py.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="install|check|report")
    command = commands.add_parser("install", help="put the lines into ai_advisor_service.py, or take them out")
    command.add_argument("--service", type=Path, required=True, help="path to ai_advisor_service.py")
    command.add_argument("--check", action="store_true", help="change nothing; show what would be done")
    command.add_argument("--uninstall", action="store_true", help="take the lines out again, byte for byte")
    command.add_argument("--db", help="jobs' database, where it is not clear: an expression of the service, or a path")
    command = commands.add_parser("check", help="check adapters before the service is started with them")
    command.add_argument("--lora_path")
    command.add_argument("--model_config")
    command.add_argument("--lora_scale", type=float, help="scale of an older mlx-vlm adapter that does not tell it")
    command.add_argument("--base_model", help="model folder, or hub id in the local cache, to check against")
    command = commands.add_parser("report", help="compare the arms from the jobs table")
    command.add_argument("--db", type=Path, default=Path("mondrian.db"), help="database with the jobs table")
    command.add_argument("--days", type=float, default=7, help="how far back to look; 0 takes all (default: 7)")
    command.add_argument("--format", choices=("table", "json", "html"), default="table")
    command.add_argument("--output", type=Path, help="file to write instead of the screen")
    command.add_argument(
        "--watch",
        type=float,
        nargs="?",
        const=60,
        metavar="SECONDS",
        help="look every so often (60) until the test has an answer; exit code 0: scores higher, 3: lower, "
        "4: a guardrail is broken, 5: no difference that matters",
    )
    command.add_argument(
        "--schedule", type=schedule, default="5%,25%,50%", help="shares of a canary (default: %(default)s)"
    )
    given = parser.parse_args(arguments)
    try:
        if given.command == "install":
            from .install import install

            install(given.service, given.check, given.uninstall, given.db)
        elif given.command == "check":
            check_adapters(given)
        else:
            report_arms(given)
    except Refusal as error:
        for problem in error.problems:
            print(f"lora_patch: {problem}", file=sys.stderr)
        if lines := error.by_hand():
            print("nothing was changed; the lines to add by hand:", *lines, sep="\n    ", file=sys.stderr)
        sys.exit(1)
    except (LoraError, OSError) as error:
        sys.exit(f"lora_patch: {one_line(error)}")
