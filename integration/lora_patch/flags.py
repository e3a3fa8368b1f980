"""The flags that the service gains, and their values once it has parsed its command line."""

import argparse
import functools
from dataclasses import dataclass, field, fields

MODES = ("base", "fine_tuned", "ab_test")


@dataclass
class Flags:
    """The values of our flags; the defaults are those of a service that is started without any of them."""

    lora_path: str | None = None
    model_mode: str | None = None  # base, unless --use_fine_tuned or an active model says otherwise
    use_fine_tuned: bool = False
    ab_test_split: float = 0.5  # share of jobs
    ab_test_schedule: tuple[float, ...] | None = None  # shares of jobs
    lora_scale: float | None = None  # factor of the update, for adapters whose files do not tell it
    model_config: str | None = None
    jobs_db: str | None = None
    fallback_on_invalid: bool = True
    constrained: bool = False
    allow_arm_override: bool = False
    breaker_window: int = 20  # answers
    breaker_bound: float = 0.25  # share of the window
    breaker_time_limit: float | None = None  # seconds
    service: argparse.Namespace = field(default_factory=argparse.Namespace)  # its own flags, once one of ours is given

    @property
    def is_on(self) -> bool:
        """Tell whether any flag asks for more than the service did before."""
        return bool(self.lora_path or self.model_config or self.use_fine_tuned or self.model_mode not in (None, "base"))


NAMES = tuple(f"--{one.name}" for one in fields(Flags) if one.name != "service")
flags = Flags()  # filled while the service parses its command line, whoever parses and wherever


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the flags to the service's parser and return it; their values go to `flags`."""
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
    add("--breaker_bound", type=share, help="share of bad answers above which it goes off (default: %(default)s)")
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


def share(text: str) -> float:
    value = float(text)
    if not 0.0 <= value <= 1.0:
        raise argparse.ArgumentTypeError(f"{text} is not between 0.0 and 1.0")
    return value


def schedule(text: str) -> tuple[float, ...]:
    """Return the shares in "5%,25%,50%" (or "0.05,0.25"); ArgumentTypeError unless they rise within 0 and 100%."""
    try:
        parts = [part.strip() for part in text.split(",")]
        shares = tuple(float(part.removesuffix("%")) / (100 if part.endswith("%") else 1) for part in parts)
    except ValueError:
        shares = ()
    if not shares or not shares[0] > 0 or not shares[-1] <= 1 or list(shares) != sorted(set(shares)):
        raise argparse.ArgumentTypeError(f"{text!r} is no schedule: shares that rise were expected, as in 5%,25%,50%")
    return shares


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return value


def _yes_or_no(text: str) -> bool:
    if text.lower() not in ("on", "off", "true", "false", "yes", "no", "1", "0"):
        raise argparse.ArgumentTypeError(f"{text} is neither on nor off")
    return text.lower() in ("on", "true", "yes", "1")
