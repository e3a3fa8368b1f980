"""The gates an adapter has to pass: documented defaults, a file that changes them, and a verdict for each.

A gates file (TOML or JSON) changes a default by its name, switches it off with ``enabled = false``, or adds one:

    [tuned_format]
    at_least = 0.9
    min_photographs = 20

    [inference_time]
    strict = true            # hold it against the adapter also where the base alone misses it

    [comments_overlap]
    title = "Comments like the advisor's"
    figure = "text.comments"
    arm = "candidate"
    versus = "base"          # the difference to another arm; leave out for the figure itself
    above = 0.0

A verdict comes from the figure and its one-sided 95% limits (`intervals.Figure.lower`, ``upper``): a gate asks whether
the figure is beyond its bound, not on which side it lies.
"""

import json
import operator
import tomllib
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from common.errors import UserError, refuse
from common.evaluation import intervals, metrics
from common.evaluation.intervals import Figure
from common.evaluation.metrics import Summary
from integration.lora_patch.json_text import is_number

MIN_PHOTOGRAPHS = 5  # fewer decide nothing
FORMAT_MARGIN = 0.05  # share: an answer in twenty
LOSS_MARGIN = 0.02  # nats per token: two percent of perplexity
OVERHEAD = 0.10  # share of the base's time
BOUNDS = {
    "at_least": (operator.ge, ">="),
    "at_most": (operator.le, "<="),
    "above": (operator.gt, ">"),
    "below": (operator.lt, "<"),
}
TOLERANCE = 1e-9  # a share that is equal up to rounding is not worse
MAX_NEEDED = 1_000_000  # photographs

# what each verdict means; those in BLOCKING keep an adapter from promotion, worst first
VERDICTS = {
    "pass": "the whole interval meets the bound",
    "likely": "the figure meets the bound, its interval does not decide",
    "unlikely": "the figure misses the bound, its interval does not decide",
    "fail": "the whole interval misses the bound",
    "not measured": "too few photographs, or no figure",
    "reported": "the base alone misses the bound; not held against the adapter",
    "not applicable": "there is nothing to compare with",
    "off": "switched off in the gates file",
}
BLOCKING = ("fail", "not measured", "unlikely")
ARMS = ("base", "candidate", "deployed", "base+grammar", "candidate+grammar", "candidate+expected", "constant")
MORE_DATA = "more examples or epochs"
HELP = {  # what may mend a gate that fails or is unlikely, by the beginning of its figure
    "format": f"{MORE_DATA}; the report shows each answer and what is wrong with it",
    "loss": "a lower learning rate, fewer epochs or more examples; see loss_curve.png beside the adapter",
    "speed": "a lower rank (--lora_r), or a measurement on a quiet machine",
}


@dataclass(frozen=True)
class Gate:
    """A bound, in the figure's unit, on one figure of one arm, or on its difference to another arm (``versus``)."""

    name: str
    title: str
    figure: str
    arm: str = "candidate"
    versus: str | None = None
    at_least: float | None = None
    at_most: float | None = None
    above: float | None = None
    below: float | None = None
    min_photographs: int = MIN_PHOTOGRAPHS
    enabled: bool = True
    strict: bool = True  # False: what the base alone misses is reported, not held against the adapter
    only_if: str | None = None  # applies only where the gate of this name was reported

    @property
    def bound(self) -> tuple[str, float]:
        """Return (name of the bound, its value)."""
        return next((name, getattr(self, name)) for name in BOUNDS if getattr(self, name) is not None)

    @property
    def rising(self) -> bool:
        """Tell whether higher figures meet the bound."""
        return self.bound[0] in ("at_least", "above")

    def meets(self, value: float) -> bool:
        name, limit = self.bound
        slack = {"at_least": TOLERANCE, "at_most": -TOLERANCE}.get(name, 0.0)
        return BOUNDS[name][0](value + slack, limit)

    def holds(self, figure: Figure) -> str:
        """Return "pass", "likely", "unlikely" or "fail" of a measured figure."""
        worst, best = (figure.lower, figure.upper) if self.rising else (figure.upper, figure.lower)
        if self.meets(figure.value):
            return "pass" if worst is not None and self.meets(worst) else "likely"
        return "unlikely" if best is None or self.meets(best) else "fail"


DEFAULT_GATES = (
    Gate("base_format", "Base format compliance", "format.strict", arm="base", at_least=0.90, strict=False),
    Gate(
        "base_format_kept",
        "Format not worse than the base's",
        "format.strict",
        versus="base",
        at_least=-FORMAT_MARGIN,
        only_if="base_format",
    ),
    Gate("tuned_format", "Tuned format compliance", "format.strict", at_least=0.95),
    Gate("inference_time", "Median inference time", "speed.seconds", below=3.0, strict=False),
    Gate(
        "base_time_kept",
        "Time for an answer of equal length not above the base's",
        "speed.overhead",
        at_most=OVERHEAD,
        only_if="inference_time",
    ),
    Gate("overhead", "Inference overhead of the adapter", "speed.overhead", below=OVERHEAD),
    Gate("base_loss", "Validation loss not worse than the base's", "loss.nats", versus="base", at_most=LOSS_MARGIN),
    Gate(
        "deployed_format", "Format not worse than deployed", "format.strict", versus="deployed", at_least=-FORMAT_MARGIN
    ),
    Gate(
        "deployed_loss", "Validation loss not worse than deployed", "loss.nats", versus="deployed", at_most=LOSS_MARGIN
    ),
    Gate("same_advice", "Answers with the same advice twice", "distinct.same_advice", at_most=0.05, enabled=False),
)


def load_gates(path: Path | None) -> list[Gate]:
    """Return the default gates as changed by a TOML or JSON file; UserError names all that is wrong with it."""
    gates = {gate.name: gate for gate in DEFAULT_GATES}
    problems = []
    for name, changes in (_read(path) if path else {}).items():
        try:
            gates[name] = _changed(gates.get(name), name, changes)
        except ValueError as error:
            problems.append(f"{path}: [{name}]: {error}")
    for gate in gates.values():
        if gate.only_if and (gate.only_if == gate.name or gate.only_if not in gates):
            problems.append(f"{path}: [{gate.name}]: only_if: another gate was expected, and {gate.only_if} is none")
    refuse(problems)
    return list(gates.values())


def from_dicts(rows: list[dict]) -> list[Gate]:
    """Return the gates that a report was decided by (its "gates" list)."""
    return [Gate(**{field: row[field] for field in Gate.__dataclass_fields__ if field in row}) for row in rows]


def decide(gates: list[Gate], summary: Summary) -> list[dict]:
    """Return a row a gate: its definition, "value", "low", "lower", "upper", "high", "n", "verdict" (`VERDICTS`),
    "reason" (one line) and "decides": what would settle a gate that is not settled, or may mend one that fails."""
    found: dict[str, dict] = {}
    for gate in sorted(gates, key=lambda gate: gate.only_if is not None):
        found[gate.name] = asdict(gate) | _verdict(gate, summary, found)
    return [found[gate.name] for gate in gates]


def failed(rows: list[dict], strict: bool = False) -> list[dict]:
    """Return the rows that keep an adapter from being promoted, worst first; ``strict`` lets "pass" alone through."""
    blocking = BLOCKING + (("likely",) if strict else ())
    return sorted((r for r in rows if r["verdict"] in blocking), key=lambda row: blocking.index(row["verdict"]))


def undecided_speed(gates: list[Gate], timings: list[dict], arms: list[str]) -> bool:
    """Tell whether more timed runs may decide a gate on speed."""
    timed = [gate for gate in gates if gate.figure.startswith("speed.") and gate.figure != "speed.load_seconds"]
    rows = decide(timed, metrics.summarise_speed(timings, arms))
    return any(row["verdict"] in ("likely", "unlikely") for row in rows)


def bound_text(row: dict) -> str:
    """Return a gate's bound as a person reads it: ">= 95.0%"."""
    gate = from_dicts([row])[0]
    name, value = gate.bound
    return f"{BOUNDS[name][1]} {_limit(gate, value)}"


def _limit(gate: Gate, value: float) -> str:
    kind = metrics.kind(gate.figure)
    if kind.unit == "share":
        return f"{100 * value:g}" + (" points" if gate.versus else "%")
    return f"{value:g} {kind.unit}".replace(" /", "/").strip()


def format_value(figure: str, value: float | None, difference: bool = False, unit: bool = True) -> str:
    """Return a figure's value, with its unit unless ``unit`` is off (a share is in percent either way)."""
    if value is None:
        return "not measured"
    kind = metrics.kind(figure)
    sign = "+" if difference else ""
    if kind.unit == "share":
        return f"{100 * value:{sign}.1f}" + (" points" if difference and unit else "" if difference else "%")
    gap = "" if kind.unit.startswith("/") or not kind.unit else " "
    return f"{value:{sign},.{kind.digits}f}" + (f"{gap}{kind.unit}" if unit else "")


def _verdict(gate: Gate, summary: Summary, decided: dict[str, dict]) -> dict:
    figure, subject = Figure(None, 0), gate.arm if gate.versus is None else f"{gate.arm} - {gate.versus}"

    def row(verdict: str, reason: str, decides: str = "") -> dict:
        return figure.to_dict() | {"verdict": verdict, "reason": reason, "decides": decides}

    if not gate.enabled:
        return row("off", "switched off")
    if gate.only_if and decided.get(gate.only_if, {}).get("verdict") != "reported":
        return row("not applicable", "the base meets its own gate")
    absent = [arm for arm in (gate.arm, gate.versus) if arm and arm not in summary.arms]
    if absent == ["deployed"]:
        return row("not applicable", "no other version is in use")
    if absent:
        return row("not measured", f"{absent[0]} was not run")
    if gate.versus:
        figure = summary.difference(gate.arm, gate.versus, gate.figure)
    else:
        figure = summary.arms[gate.arm].get(gate.figure, figure)
    noun = "timed photographs" if gate.figure.startswith("speed.") else "held-out photographs"
    if figure.value is None and gate.figure == "speed.overhead" and _writes_nothing(summary.arms["base"]):
        return row("reported", "the base writes no answer whose time another's can be compared with")
    if figure.value is None:
        return row("not measured", f"{subject}: no figure could be measured", f"{gate.min_photographs} {noun}")
    if figure.n < gate.min_photographs:
        enough = f"{gate.min_photographs} {noun}; you have {figure.n}"
        return row(
            "not measured",
            f"{subject}: {figure.n} photographs measured, at least {gate.min_photographs} needed",
            enough,
        )
    verdict = gate.holds(figure)
    name, limit = gate.bound
    shown = format_value(gate.figure, figure.value, gate.versus is not None)
    reason = f"{subject}: {shown}, wanted {BOUNDS[name][1]} {_limit(gate, limit)}"
    if not gate.strict and verdict in ("unlikely", "fail"):
        base = summary.arms["base"].get(gate.figure)
        if base and base.value is not None and not gate.meets(base.value):
            own = "" if gate.arm == "base" else f" ({format_value(gate.figure, base.value)})"
            return row("reported", f"{reason}; the base alone misses it{own}, so it is not held against the adapter")
    decides = [_decides(gate, figure, noun)] if verdict in ("likely", "unlikely") else []
    if verdict in ("unlikely", "fail"):
        decides.append(HELP.get(gate.figure.partition(".")[0], MORE_DATA))
    return row(verdict, reason, "; or ".join(decides))


def _writes_nothing(base: dict[str, Figure]) -> bool:
    """Tell whether the base was timed, and none of its answers has a second token."""
    seconds, rate = (base.get(f"speed.{name}", Figure(None, 0)) for name in ("seconds", "tokens_per_second"))
    return seconds.value is not None and rate.value is None


# -- what would settle a gate -----------------------------------------------------------------------------------------


def _decides(gate: Gate, figure: Figure, noun: str) -> str:
    """Return what would settle an undecided gate: how many photographs, if the rest are like these."""
    worst, best = (figure.lower, figure.upper) if gate.rising else (figure.upper, figure.lower)
    if worst is None:
        return "nothing: this figure has no interval"
    have, n, limit = f"; you have {figure.n}", figure.n, gate.bound[1]
    if metrics.kind(gate.figure).unit == "share" and not gate.figure.startswith("speed."):
        counted = _share_needed(gate, figure)
        if counted:
            return counted + have
    likely = gate.meets(figure.value)
    distance, half = abs(figure.value - limit), abs((worst if likely else best) - figure.value)
    if distance < 1e-6 * max(1.0, half):
        return "no number of photographs: the figure lies at its bound"
    needed = int(np.ceil(n * (half / distance) ** 2))
    more = f"about {needed:,} {noun}, if figure and spread stay as they are"
    return (more if needed <= MAX_NEEDED else f"more than {MAX_NEEDED:,} {noun}") + have


def _share_needed(gate: Gate, figure: Figure) -> str | None:
    """Return how many photographs would pass a gate on a share, if no more of them fail; None where a photograph
    counts in part or the bound is out of reach."""
    n = figure.n
    if gate.versus:
        gained, lost = intervals.changed(figure)
        if not np.allclose(intervals.bonett_price(gained, lost, n)[1:3], (figure.lower, figure.upper)):
            return None
        meets = lambda count: gate.meets(intervals.bonett_price(gained, lost, count)[1])  # noqa: E731
        what = (
            f"with no more than {lost} that only the {gate.arm} fails"
            if lost
            else f"that the {gate.arm} does not fail alone"
        )
        needed = _smallest(meets, n)
        return needed and f"{needed:,} held-out photographs {what}"
    faults = (1 - figure.value if gate.rising else figure.value) * n
    if not np.isclose(faults, round(faults)):
        return None
    faults = round(faults)

    def meets(count: int) -> bool:
        low, high = intervals.clopper_pearson(count - faults if gate.rising else faults, count)[1:3]
        return gate.meets(low if gate.rising else high)

    needed = _smallest(meets, n)
    what = "without a fault" if not faults else f"with no more than {faults} fault" + "s" * (faults > 1)
    return needed and f"{needed:,} held-out photographs {what}"


def _smallest(meets: Callable[[int], bool], low: int) -> int | None:
    """Return the smallest number from ``low`` to `MAX_NEEDED` that meets a test which larger ones meet too."""
    high = low
    while not meets(high):
        low, high = high, 2 * high
        if high > MAX_NEEDED:
            return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if meets(middle) else (middle + 1, high)
    return low


# -- the gates file ---------------------------------------------------------------------------------------------------


def _read(path: Path) -> dict:
    try:
        text = Path(path).read_text(encoding="utf-8")
        found = json.loads(text) if Path(path).suffix == ".json" else tomllib.loads(text)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such gates file; see common/evaluation/gates.py for the form") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as gates ({error})") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: a table of gates was expected")
    return found


def _changed(default: Gate | None, name: str, changes: object) -> Gate:
    if not isinstance(changes, dict):
        raise ValueError("a table of settings was expected")
    unknown = changes.keys() - Gate.__dataclass_fields__.keys() | changes.keys() & {"name"}
    if unknown:
        raise ValueError(f"unknown setting {', '.join(sorted(unknown))}")
    bounds = [key for key in BOUNDS if key in changes]
    if len(bounds) > 1 or (default is None and len(bounds) != 1):
        raise ValueError(f"exactly one bound of {', '.join(BOUNDS)} is needed")
    for key, value in changes.items():
        texts = dict.fromkeys(("title", "figure", "arm", "versus", "only_if"), str)
        wanted = {"enabled": bool, "strict": bool, "min_photographs": int, **texts}
        if key in BOUNDS and not is_number(value):
            raise ValueError(f"{key}: a number was expected")
        if key in wanted and type(value) is not wanted[key]:
            raise ValueError(f"{key}: {wanted[key].__name__} was expected")
    if bounds:  # a new bound takes the place of the default's, of whichever kind
        changes = {key: None for key in BOUNDS} | changes
    if default is None and "figure" not in changes:
        raise ValueError("a new gate needs a figure")
    gate = replace(default, **changes) if default else Gate(**({"name": name, "title": name} | changes))
    for arm in (gate.arm, gate.versus):
        if arm is not None and arm not in ARMS:
            raise ValueError(f"unknown arm {arm}; known: {', '.join(ARMS)}")
    try:
        metrics.kind(gate.figure)
    except KeyError as error:
        known = ", ".join(metrics.KINDS)
        raise ValueError(
            f"unknown figure {gate.figure}; known: {known}, failure:CLASS and mae:NAME, rank:NAME, pearson:NAME, "
            "pairs:NAME of a dimension"
        ) from error
    if gate.versus is not None and (gate.arm, gate.versus) not in metrics.pairs(list(ARMS)):
        known = ", ".join(f"{ours} versus {theirs}" for ours, theirs in metrics.pairs(list(ARMS)))
        raise ValueError(f"{gate.arm} is not compared with {gate.versus}; known: {known}")
    if gate.versus is not None and not metrics.is_paired(gate.figure):
        raise ValueError(f"versus: {gate.figure} is not compared photograph by photograph; leave versus out")
    if metrics.kind(gate.figure).unit == "share" and gate.figure != "speed.overhead" and abs(gate.bound[1]) > 1:
        raise ValueError(f"{gate.bound[0]}: a share from 0 to 1 was expected, as in 0.95 for 95%")
    if gate.min_photographs < 1:
        raise ValueError("min_photographs: at least 1")
    return gate
