"""Draft tokens for a row: guesses that a single pass of the model verifies, so that the output stays what it is.

Three sources, in this order: what the answer's schema forces (keys, names, punctuation), the adapter's phrasebook, and
the answer so far. A draft has the length that promises most tokens a second, by the measured times of passes and the
measured luck of each source. Where drafting turns out slower than single steps it pauses, for all answers of its kind;
in a pause what the schema forces is still verified in one pass where that pays.
"""

from collections import deque
from dataclasses import dataclass, field

import numpy as np

from .grammar import Grammar, Matcher
from .phrasebook import Continuations

OWN = {6: 0.7, 3: 0.4, 2: 0.3}  # lengths of the contexts that are looked up in the answer so far: how often one holds
PAUSE = 48  # tokens for which drafting stays off after it did not pay; doubled each time
LONGEST_PAUSE = 64 * PAUSE
FIRST = 6  # single steps to begin with, and again after `RETIMED` tokens: their time is what a draft has to beat
RETIMED = 1024
WINDOW = 24  # passes over which drafting is judged
LEAST = 0.05  # a guess less likely than that is not followed


@dataclass
class Pace:
    """How long things take, and what drafting brought, in answers of one kind; kept over the answers of an engine.

    Times are running means in seconds; pauses are counted in tokens.
    """

    single: float | None = None  # a single step, where it can be launched before the last token is read
    timed: int = 0  # single steps since their time was last wanted, `FIRST` are
    seconds: dict[int, float] = field(default_factory=dict)  # a pass that verifies, by number of tokens
    met: set[int] = field(default_factory=set)
    judged: deque = field(default_factory=lambda: deque(maxlen=WINDOW))  # (tokens, seconds) of the last passes
    off: int = 0
    pause: int = PAUSE
    tokens: int = 0  # of all answers
    passes: int = 0

    @property
    def resting(self) -> bool:
        """Whether single steps are to be made now: for their time, or because drafting did not pay."""
        return self.timed < FIRST or self.off > 0

    def step(self, count: int, seconds: float | None) -> None:
        """Note ``count`` single steps; ``seconds`` of one where it could be told."""
        if seconds is not None:
            self.single = _mean(self.single, seconds)
            self.timed += count
        self.off -= min(count, self.off)

    def note(self, tokens: int, seconds: float) -> None:
        """Note a verifying pass."""
        if tokens not in self.met:
            self.met.add(tokens)  # the first pass of a width may compile something
        else:
            self.seconds[tokens] = _mean(self.seconds.get(tokens), seconds)

    def judge(self, won: float, seconds: float) -> None:
        """Note what a pass won a row in how long; begin a pause where the last ones were slower than single steps."""
        if self.off:  # a pass within a pause
            self.off -= min(int(won), self.off)
            return
        self.judged.append((won, seconds))
        if len(self.judged) < WINDOW:
            return
        tokens, spent = (sum(part) for part in zip(*self.judged, strict=True))
        if spent > 1.02 * self.single * tokens:
            self.off, self.pause = self.pause, min(2 * self.pause, LONGEST_PAUSE)
            self.judged.clear()
        else:
            self.pause = PAUSE

    def count(self, tokens: int, passes: int) -> None:
        """Note an answer."""
        if (self.tokens + tokens) // RETIMED > self.tokens // RETIMED:
            self.timed = 0
        self.tokens, self.passes = self.tokens + tokens, self.passes + passes

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
        a row that must keep to a grammar."""
        self.pace, self.phrasebook, self.bound = pace, phrasebook, bound
        self._schema = schema.matcher() if schema and not bound else None
        self._own: dict[tuple[int, ...], int] = {}  # context -> what followed it last
        self._rates = {"schema": 0.97, "phrasebook": 0.9, **OWN}  # how often a source's guess held, running
        self._sources: list[str | int] = []
        self._known = 0  # tokens of the answer that were taken in

    @property
    def watching(self) -> bool:
        """Whether `foresees` is to be asked before each of these steps."""
        return self.pace.timed >= FIRST and self._matcher is not None

    def foresees(self, tokens: list[int]) -> bool:
        """Tell, while a single step after ``tokens`` is under way, whether the schema forces so many more than its
        token that verifying them in one pass pays."""
        self._learn(tokens)
        count = len(self._matcher.forced()) if self._matcher else 0
        return count > 1 and count * self.pace.single > self.pace.cost(count)

    def guess(self, tokens: list[int], longest: int) -> tuple[list[int], list[float]]:
        """Guess what follows the answer so far: at most ``longest`` tokens, none where nothing is likely. Return them
        and of each the chance that it and all before it hold."""
        self._learn(tokens)
        draft, chances, sources, chance = [], [], [], 1.0
        for token in (self._matcher.forced() if self._matcher and longest > 0 else [])[:longest]:
            draft.append(token)
            sources.append("schema")
            chance *= self._rates["schema"]
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
        self._sources = sources
        return draft, chances

    def note(self, verified: int, held: int) -> None:
        """Note how many of the last guesses were verified, and held."""
        for at, source in enumerate(self._sources[: min(verified, held + 1)]):
            self._rates[source] += 0.1 * ((at < held) - self._rates[source])

    @property
    def _matcher(self) -> Matcher | None:
        return self.bound or self._schema

    def _guess(self, context: list[int]) -> tuple[str | int | None, int, float]:
        """Return (source, likely next token, its chance); a source in the answer so far is its context's length."""
        found = self.phrasebook.after(context) if self.phrasebook else None
        chance = min(found[1], self._rates["phrasebook"]) if found else 0.0
        for order in OWN:
            own = self._own.get(tuple(context[-order:])) if len(context) >= order else None
            if own is not None:
                if chance >= self._rates[order]:
                    break
                return order, own, self._rates[order]
        return ("phrasebook", found[0], chance) if found else (None, 0, 0.0)

    def _learn(self, tokens: list[int]) -> None:
        """Take in what is new of the answer."""
        new, at = tokens[self._known :], self._known
        self._known = len(tokens)
        for end in range(at, len(tokens)):
            for order in OWN:
                if end >= order:
                    self._own[tuple(tokens[end - order : end])] = tokens[end]
        if self._schema and not self._schema.follows(new):
            self._schema = None


def _mean(old: float | None, new: float) -> float:
    """Follow what is measured slowly, as the sums of `Pace.judge` do; forget at once a time with a compiler's in it."""
    return new if old is None or new < old / 2 else 0.9 * old + 0.1 * min(new, 2 * old)
