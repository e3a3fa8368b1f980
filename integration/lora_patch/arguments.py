"""The service's command line: our flags are added to its parser, or taken out where it has none."""

import argparse
import functools
import os
import shlex
import sys

from .flags import MODES, flags, schedule, share

TAKEN = "LORA_PATCH_ARGUMENTS"  # environment: the command line as it was, for a reloader's processes


def add_arguments(parser: argparse.ArgumentParser | None = None) -> argparse.ArgumentParser:
    """Add the flags to the service's parser and return it; their values go to `flags`.

    Without a parser (a service that reads the environment, or parses elsewhere) they are taken out of the command line
    at once, and the service never sees them.
    """
    if parser is None:
        own = add_arguments(argparse.ArgumentParser(add_help=False, allow_abbrev=False))
        own.parse_known_args(shlex.split(os.environ.get(TAKEN, "")))
        _, rest = own.parse_known_args()
        if len(rest) < len(sys.argv) - 1:
            os.environ[TAKEN] = shlex.join(sys.argv[1:])
            sys.argv[1:] = rest
        return own
    add = functools.partial(parser.add_argument_group("LoRA adapters").add_argument, action=_Flag)
    add("--lora_path", help="adapter folder, folder of versions, or ansel=FOLDER,weston=FOLDER; a:0.7,b:0.3 combines")
    add("--model_mode", choices=MODES, help="which model answers (default: base)")
    add("--ab_test_split", type=share, help="share of jobs that ab_test gives to the adapter (default: %(default)s)")
    add(
        "--ab_test_schedule",
        type=schedule,
        help="shares that ab_test widens to while its guardrails hold: 5%%,25%%,50%%",
    )
    add("--lora_scale", type=float, help="scale of an older mlx-vlm adapter whose files do not tell it")
    add("--use_fine_tuned", nargs=0, help="the same as --model_mode fine_tuned")
    add("--model_config", help="JSON with named models and active_model, or a deployed.json")
    add("--jobs_db", help="database with the jobs table (default: the service's, else mondrian.db)")
    add("--fallback_on_invalid", type=_yes_or_no, help="on|off: retry an unusable answer on the base (default: on)")
    add("--constrained", nargs=0, help="decode under the grammar of the analysis, so that every whole answer parses")
    add("--allow_arm_override", nargs=0, help="debugging: let a request choose with X-Lora-Arm: base|fine_tuned")
    add(
        "--breaker_window",
        type=_count,
        help="answers of an adapter that its circuit breaker looks at (default: %(default)s)",
    )
    add("--breaker_bound", type=share, help="share of bad answers above which it opens (default: %(default)s)")
    add("--breaker_time_limit", type=float, help="seconds; a slower answer is a bad one (default: --model_timeout)")
    return parser


class _Flag(argparse.Action):
    def __init__(self, option_strings, dest, **settings):
        super().__init__(option_strings, dest, default=getattr(flags, dest), **settings)

    def __call__(self, parser, namespace, values, option_string=None):
        value = True if self.nargs == 0 else values
        setattr(namespace, self.dest, value)
        setattr(flags, self.dest, value)
        flags.service = namespace
        if flags.is_on:
            from .takeover import begin

            begin()


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return value


def _yes_or_no(text: str) -> bool:
    if text.lower() not in ("on", "off", "true", "false", "yes", "no", "1", "0"):
        raise argparse.ArgumentTypeError(f"{text} is neither on nor off")
    return text.lower() in ("on", "true", "yes", "1")
