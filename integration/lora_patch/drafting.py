"""Draft tokens for one row: guesses that a single pass of the model verifies, so that the output stays what it is.

Three sources, in this order: what the answer's schema forces (keys, names, punctuation), the adapter's phrasebook, and
the answer so far. A guess goes on while the chance that all of it holds is worth what one token more costs in a pass;
both are measured while decoding. Where drafting turns out slower than single steps it pauses.
"""

import time
from dataclasses import dataclass, field

from .grammar import Grammar, Matcher
from .phrasebook import Continuations

OWN_ORDERS = (6, 3, 2)  # lengths of the contexts that are looked up in the answer so far
PAUSE = 48  # tokens for which drafting stays off after it did not pay; doubled each time
FIRST = 6  # tokens before the first guess
WINDOW = 24  # passes over which it is judged


@dataclass
class Pace:
    """How long passes take here, by number of tokens: running means in seconds."""

    seconds: dict[int, float] = field(default_factory=dict)
    met: set[int] = field(default_factory=set)

    def note(self, tokens: int, seconds: float) -> None:
        if tokens not in self.met:
            self.met.add(tokens)  # the first pass of a width may compile something
            return
        old = self.seconds.get(tokens)
        self.seconds[tokens] = seconds if old is None or seconds < old else 0.9 * old + 0.1 * seconds

    def marginal(self) -> float:
        """Return what one token more in a pass costs, in single steps."""
        single, wide = self.seconds.get(1), {n: s for n, s in self.seconds.items() if n > 1}
        if not single or not wide:
            return 0.1
        width = max(wide)
        return min(max((wide[width] - single) / single / (width - 1), 0.02), 0.9)


class Drafter:
    """The guesses for one row, and what became of them."""

    def __init__(self, pace: Pace, phrasebook: Continuations | None, schema: Grammar | None, bound: Matcher | None):
        """``schema``: of the answers usually given, followed as long as the row keeps to it; ``bound``: the matcher of
        a row that must keep to a grammar, which forces tokens with certainty."""
        self.pace, self.phrasebook, self.bound = pace, phrasebook, bound
        self._schema = schema.matcher() if schema and not bound else None
        self._own: dict[tuple[int, ...], int] = {}  # context -> what followed it last
        self._rates = {"schema": 0.9, "phrasebook": 0.8, "own": 0.5}  # how often a source's guess held, running
        self._sources: list[str] = []
        self._history: list[tuple[int, int, float]] = []  # tokens run, tokens won, seconds, of the last passes
        self._off, self._pause = FIRST, PAUSE
        self._started = 0.0

    @property
    def resting(self) -> bool:
        """Whether single steps are to be made now: at first, for their time, and after drafting did not pay."""
        return self._off > 0

    def stepped(self, count: int, seconds: float | None) -> None:
        """Note ``count`` single steps; ``seconds`` of one where it could be told."""
        if seconds is not None:
            self.pace.note(1, seconds)
        self._off -= count

    def propose(self, tokens: list[int], longest: int) -> list[int]:
        """Guess what follows the answer so far: at most ``longest`` tokens, none where nothing is likely."""
        self._sources = []
        if longest <= 0:
            return []
        draft, chance, floor = [], 1.0, self.pace.marginal()
        matcher = self.bound or self._schema
        for token in (matcher.forced() if matcher else [])[:longest]:
            draft.append(token)
            self._sources.append("schema")
            chance *= 1.0 if self.bound else self._rates["schema"]
        context = tokens[-8:] + draft
        while len(draft) < longest:
            source, token, share = self._guess(context)
            if source is None:
                break
            chance *= share * self._rates[source] if source == "own" else share
            if chance < floor:
                break
            draft.append(token)
            context.append(token)
            self._sources.append(source)
        return draft

    def _guess(self, context: list[int]) -> tuple[str | None, int, float]:
        found = self.phrasebook.after(context) if self.phrasebook else None
        for order in OWN_ORDERS:
            own = self._own.get(tuple(context[-order:])) if len(context) >= order else None
            if own is not None:
                if found and found[1] * self._rates["phrasebook"] >= self._rates["own"]:
                    break
                return "own", own, 1.0
        return ("phrasebook", *found) if found else (None, 0, 0.0)

    def start(self) -> None:
        self._started = time.perf_counter()

    def taken(self, run: int, held: int, gained: list[int], tokens: list[int]) -> None:
        """Note a pass of ``run`` tokens in which ``held`` of the guesses held, and ``gained`` were won; ``tokens`` is
        the whole answer after it."""
        seconds = time.perf_counter() - self._started
        self.pace.note(run, seconds)
        for at, source in enumerate(self._sources[: held + 1]):
            self._rates[source] += 0.1 * ((at < held) - self._rates[source])
        self.learn(gained, tokens)
        self._judge(run, len(gained))

    def learn(self, gained: list[int], tokens: list[int]) -> None:
        """Take in the answer's newest tokens, ``gained``; ``tokens`` is the whole answer with them."""
        for at in range(len(tokens) - len(gained), len(tokens)):
            for order in OWN_ORDERS:
                if at >= order:
                    self._own[tuple(tokens[at - order : at])] = tokens[at]
        if self._schema and not self._schema.follows(gained):
            self._schema = None

    def _judge(self, run: int, gained: int) -> None:
        self._history = [*self._history[-WINDOW + 1 :], (run, gained + 1, self.pace.seconds.get(run, 0.0))]
        single = self.pace.seconds.get(1)
        if not single or len(self._history) < WINDOW:
            return
        if sum(s for *_, s in self._history) > 1.02 * single * sum(g for _, g, _ in self._history):
            self._off, self._pause, self._history = self._pause, 2 * self._pause, []
