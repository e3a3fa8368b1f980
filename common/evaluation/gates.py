"""The gates an adapter has to pass: documented defaults, a file that changes them, and a verdict for each.

A gates file (TOML or JSON) changes a default by its name, switches it off with ``enabled = false``, or adds one:

    [tuned_format]
    at_least = 0.9
    min_photographs = 20

    [comments_overlap]
    title = "Comments like the advisor's"
    figure = "text.comments"
    arm = "candidate"
    versus = "base"          # the difference to another arm; leave out for the figure itself
    above = 0.0

A gate passes only on a measured figure: too few photographs, or a figure that is not defined, fail as "not measured".
"""

import json
import operator
import tomllib
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from common.errors import UserError, refuse
from common.evaluation import metrics

MIN_PHOTOGRAPHS = 10  # fewer held-out photographs decide nothing about a share near 95%
MIN_TIMED = 5  # timed photographs
BOUNDS = {
    "at_least": (operator.ge, ">="),
    "at_most": (operator.le, "<="),
    "above": (operator.gt, ">"),
    "below": (operator.lt, "<"),
}
TOLERANCE = 1e-9  # a share that is equal up to rounding is not worse


@dataclass(frozen=True)
class Gate:
    """A bound on one figure of one arm, or on its difference to another arm (``versus``)."""

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

    @property
    def bound(self) -> tuple[str, float]:
        """Return (name of the bound, its value)."""
        return next((name, getattr(self, name)) for name in BOUNDS if getattr(self, name) is not None)


DEFAULT_GATES = (
    Gate("base_format", "Base format compliance", "format.strict", arm="base", at_least=0.90),
    Gate("tuned_format", "Tuned format compliance", "format.strict", at_least=0.95),
    Gate("inference_time", "Median inference time", "speed.seconds", below=3.0, min_photographs=MIN_TIMED),
    Gate("overhead", "Inference overhead of the adapter", "speed.overhead", below=0.10, min_photographs=MIN_TIMED),
    Gate("base_loss", "Validation loss not worse than the base's", "loss.nats", versus="base", at_most=0.0),
    Gate("deployed_format", "Format not worse than deployed", "format.strict", versus="deployed", at_least=0.0),
    Gate("deployed_loss", "Validation loss not worse than deployed", "loss.nats", versus="deployed", at_most=0.0),
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
    refuse(problems)
    return list(gates.values())


def from_dicts(rows: list[dict]) -> list[Gate]:
    """Return the gates that a report was decided by (its "gates" list)."""
    return [Gate(**{field: row[field] for field in Gate.__dataclass_fields__ if field in row}) for row in rows]


def decide(gates: list[Gate], summary: dict) -> list[dict]:
    """Return a row a gate: its definition, "value", "low", "high", "n", "verdict" and "reason" (one line).

    Verdicts: "pass", "fail", "not measured" (which fails), "not applicable" (there is no such arm: nothing is in use
    yet) and "off".
    """
    return [asdict(gate) | _verdict(gate, summary) for gate in gates]


def failed(rows: list[dict]) -> list[dict]:
    """Return the rows that keep an adapter from being promoted."""
    return [row for row in rows if row["verdict"] in ("fail", "not measured")]


def bound_text(row: dict) -> str:
    """Return a gate's bound as a person reads it: ">= 95.0%"."""
    gate = from_dicts([row])[0]
    name, value = gate.bound
    return f"{BOUNDS[name][1]} {_limit(gate, value)}"


def _limit(gate: Gate, value: float) -> str:
    # "+0.0000" would look like a measurement; the bound of "not worse" is zero itself
    return "0" if value == 0 else format_value(gate.figure, value, gate.versus is not None)


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


def _verdict(gate: Gate, summary: dict) -> dict:
    arms = summary["arms"]
    found = {"value": None, "low": None, "high": None, "n": 0}
    if not gate.enabled:
        return found | {"verdict": "off", "reason": "switched off in the gates file"}
    absent = [arm for arm in (gate.arm, gate.versus) if arm and arm not in arms]
    if absent == ["deployed"]:
        return found | {"verdict": "not applicable", "reason": "no other version is in use"}
    if absent:
        return found | {"verdict": "not measured", "reason": f"{absent[0]} was not run"}
    table = summary["differences"].get(f"{gate.arm}-{gate.versus}", {}) if gate.versus else arms[gate.arm]
    found |= table.get(gate.figure, {})
    name, limit = gate.bound
    subject = gate.arm if gate.versus is None else f"{gate.arm} - {gate.versus}"
    if found["value"] is None:
        return found | {"verdict": "not measured", "reason": f"{subject}: no figure could be measured"}
    if found["n"] < gate.min_photographs:
        reason = f"{subject}: {found['n']} photographs measured, at least {gate.min_photographs} needed"
        return found | {"verdict": "not measured", "reason": reason}
    compare, sign = BOUNDS[name]
    slack = {"at_least": TOLERANCE, "at_most": -TOLERANCE}.get(name, 0.0)
    passed = compare(found["value"] + slack, limit)
    shown = format_value(gate.figure, found["value"], gate.versus is not None)
    reason = f"{subject}: {shown}, wanted {sign} {_limit(gate, limit)}"
    return found | {"verdict": "pass" if passed else "fail", "reason": reason}


def _read(path: Path) -> dict:
    try:
        text = Path(path).read_text(encoding="utf-8")
        found = json.loads(text) if Path(path).suffix == ".json" else tomllib.loads(text)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such gates file; see common/evaluation/gates.py for the form") from error
    except (OSError, ValueError) as error:
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
        wanted = {"enabled": bool, "min_photographs": int, "title": str, "figure": str, "arm": str, "versus": str}
        if key in BOUNDS and (isinstance(value, bool) or not isinstance(value, int | float) or value != value):
            raise ValueError(f"{key}: a number was expected")
        if key in wanted and type(value) is not wanted[key]:
            raise ValueError(f"{key}: {wanted[key].__name__} was expected")
    if bounds:  # a new bound takes the place of the default's, of whichever kind
        changes = {key: None for key in BOUNDS} | changes
    if default is None and "figure" not in changes:
        raise ValueError("a new gate needs a figure")
    gate = replace(default, **changes) if default else Gate(**({"name": name, "title": name} | changes))
    known_arms = ("base", "candidate", "deployed", "base+grammar", "candidate+grammar")
    for arm in (gate.arm, gate.versus):
        if arm is not None and arm not in known_arms:
            raise ValueError(f"unknown arm {arm}; known: {', '.join(known_arms)}")
    try:
        metrics.kind(gate.figure)
    except KeyError as error:
        known = ", ".join(metrics.KINDS)
        raise ValueError(f"unknown figure {gate.figure}; known: {known}, mae:NAME, rank:NAME, failure:CLASS") from error
    if gate.min_photographs < 1:
        raise ValueError("min_photographs: at least 1")
    return gate
