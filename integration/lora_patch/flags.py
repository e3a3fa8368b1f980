"""The flags that the service gains, and their values once it has parsed its command line."""

import argparse
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
flags = Flags()  # filled while the service parses its command line


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
