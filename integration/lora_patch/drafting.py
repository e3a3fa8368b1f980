"""Draft tokens for one row: guesses that a single pass of the model verifies, so that the output stays what it is.

Three sources, in this order: what the answer's schema forces (keys, names, punctuation), the adapter's phrasebook, and
the answer so far. A draft has the length that promises most tokens a second, by the measured times of passes and the
measured luck of each source. Where drafting turns out slower than single steps it pauses, for all answers of its kind.
"""

import time
from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass, field

import numpy as np

from .grammar import Grammar, Matcher
from .phrasebook import Continuations

OWN_ORDERS = (6, 3, 2)  # lengths of the contexts that are looked up in the answer so far
PAUSE = 48  # tokens for which drafting stays off after it did not pay; doubled each time
LONGEST_PAUSE = 64 * PAUSE
FIRST = 6  # single steps at the start of an answer: their time is what a draft has to beat
WINDOW = 24  # passes over which it is judged
LEAST = 0.05  # a guess less likely than that is not followed


@dataclass
class Record:
    """What drafting brought in answers of one kind: (tokens, seconds) of the last passes, and pauses in tokens."""

    passes: deque = field(default_factory=lambda: deque(maxlen=WINDOW))
    off: int = 0
    pause: int = PAUSE


@dataclass
class Pace:
    """How long things take here: running means in seconds, kept over the answers of an engine."""

    single: float | None = None  # a single step, where the next one is launched before this one is read
    seconds: dict[int, float] = field(default_factory=dict)  # a pass that verifies, by number of tokens
    met: set[int] = field(default_factory=set)
    records: dict[Hashable, Record] = field(default_factory=dict)
    made: dict[str, tuple[int, int]] = field(default_factory=dict)  # (tokens, passes) by arm

    def count(self, arm: str, tokens: int, passes: int) -> None:
        """Note an answer of the base or of an adapter."""
        before = self.made.get(arm, (0, 0))
        self.made[arm] = before[0] + tokens, before[1] + passes

    def tokens_a_pass(self) -> dict[str, float]:
        return {arm: round(tokens / passes, 2) for arm, (tokens, passes) in sorted(self.made.items())}

    def note(self, tokens: int, seconds: float) -> None:
        """Note a verifying pass."""
        if tokens not in self.met:
            self.met.add(tokens)  # the first pass of a width may compile something
        else:
            self.seconds[tokens] = _mean(self.seconds.get(tokens), seconds)

    def cost(self, tokens: int) -> float:
        """Return the seconds of a pass of so many tokens: measured, or between and beyond what was measured."""
        known = dict(self.seconds) or {1: self.single or 1.0}
        widths = sorted(known)
        beyond = max(0, tokens - widths[-1]) * 0.1 * known[widths[0]]
        return float(np.interp(tokens, widths, [known[width] for width in widths])) + beyond

    def length(self, chances: list[float]) -> int:
        """Return how many guesses to verify, so that most tokens a second come of it; ``chances``: of each guess that
        it and all before it hold."""
        won = np.cumsum([1.0, *chances])
        return int(np.argmax([tokens / self.cost(width) for width, tokens in enumerate(won, 1)]))


class Drafter:
    """The guesses for one row, and what became of them."""

    def __init__(self, pace: Pace, phrasebook: Continuations | None, schema: Grammar | None, bound: Matcher | None):
        """``schema``: of the answers usually given, followed as long as the row keeps to it; ``bound``: the matcher of
        a row that must keep to a grammar, which forces tokens with certainty."""
        self.pace, self.phrasebook, self.bound = pace, phrasebook, bound
        self._record = pace.records.setdefault((phrasebook is not None, bound is not None), Record())
        self._schema = schema.matcher() if schema and not bound else None
        self._own: dict[tuple[int, ...], int] = {}  # context -> what followed it last
        self._rates = {"schema": 0.9, "phrasebook": 0.9, "own": 0.5}  # how often a source's guess held, running
        self._sources: list[str] = []
        self._known = 0  # tokens of the answer that were taken in
        self._first = FIRST
        self._started = self._verified = 0.0

    @property
    def resting(self) -> bool:
        """Whether single steps are to be made now: at first, for their time, and after drafting did not pay."""
        return self._first > 0 or self._record.off > 0

    def stepped(self, count: int, seconds: float | None) -> None:
        """Note ``count`` single steps; ``seconds`` of one where it could be told."""
        if seconds is not None:
            self.pace.single = _mean(self.pace.single, seconds)
        self._first -= count
        self._record.off -= min(count, self._record.off)

    def propose(self, tokens: list[int], longest: int) -> list[int]:
        """Guess what follows the answer so far: at most ``longest`` tokens, none where nothing is likely."""
        self._started = time.perf_counter()
        self._learn(tokens)
        draft, chances, sources, chance = [], [], [], 1.0
        matcher = self.bound or self._schema
        for token in (matcher.forced() if matcher and longest > 0 else [])[:longest]:
            draft.append(token)
            sources.append("schema")
            chance *= 1.0 if self.bound else self._rates["schema"]
            chances.append(chance)
        context = tokens[-8:] + draft
        while len(draft) < longest:
            source, token, share = self._guess(context)
            chance *= share
            if source is None or chance < LEAST:
                break
            draft.append(token)
            context.append(token)
            sources.append(source)
            chances.append(chance)
        length = self.pace.length(chances)
        self._sources = sources[:length]
        return draft[:length]

    def _guess(self, context: list[int]) -> tuple[str | None, int, float]:
        """Return (source, likely next token, its chance)."""
        found = self.phrasebook.after(context) if self.phrasebook else None
        for order in OWN_ORDERS:
            own = self._own.get(tuple(context[-order:])) if len(context) >= order else None
            if own is not None:
                if found and min(found[1], self._rates["phrasebook"]) >= self._rates["own"]:
                    break
                return "own", own, self._rates["own"]
        return ("phrasebook", found[0], min(found[1], self._rates["phrasebook"])) if found else (None, 0, 0.0)

    def verifying(self) -> None:
        """The pass begins."""
        self._verified = time.perf_counter()

    def taken(self, run: int, held: int, gained: int) -> None:
        """Note a pass of ``run`` tokens in which ``held`` of the guesses held; ``gained`` of them were wanted."""
        now = time.perf_counter()
        self.pace.note(run, now - self._verified)
        for at, source in enumerate(self._sources[: held + 1]):
            self._rates[source] += 0.1 * ((at < held) - self._rates[source])
        self._judge(gained + 1, now - self._started)

    def _learn(self, tokens: list[int]) -> None:
        """Take in what is new of the answer."""
        new, at = tokens[self._known :], self._known
        self._known = len(tokens)
        for end in range(at, len(tokens)):
            for order in OWN_ORDERS:
                if end >= order:
                    self._own[tuple(tokens[end - order : end])] = tokens[end]
        if self._schema and not self._schema.follows(new):
            self._schema = None

    def _judge(self, won: int, seconds: float) -> None:
        record, single = self._record, self.pace.single
        record.passes.append((won, seconds))
        if not single or len(record.passes) < WINDOW:
            return
        if sum(s for _, s in record.passes) > 1.02 * single * sum(n for n, _ in record.passes):
            record.off, record.pause = record.pause, min(2 * record.pause, LONGEST_PAUSE)
            record.passes.clear()
        else:
            record.pause = PAUSE


def _mean(old: float | None, new: float) -> float:
    """Follow a lower time at once, a higher one slowly: a busy moment is no property of the machine."""
    return new if old is None or new < old else 0.9 * old + 0.1 * new
