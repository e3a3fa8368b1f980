"""Which adapters are in use: read and checked at the start and at each reload, over the model that is served."""

import logging
import threading
from pathlib import Path

from .adapters import Adapter, read_adapter
from .arms import Breaker
from .base import check_base, read_base
from .errors import LoraError, first_of
from .flags import Flags, flags
from .log import say
from .own_generation import OwnGeneration
from .sources import EVERYONE, Source, find_sources, unpromoted
from .switching import check_layers, make_switchable
from .versions import RECORD


def distinct(table: dict[str, Adapter]) -> list[Adapter]:
    """Return each adapter of a table once."""
    return list({id(adapter): adapter for adapter in table.values()}.values())


class AdaptersInUse:
    """The adapter of each advisor, the mode, and the model that they are for."""

    def __init__(self):
        self.table: dict[str, Adapter] = {}  # by advisor, or `EVERYONE`
        self.mode, self.split, self.problem = "base", Flags.ab_test_split, None
        self.asked: str | None = None  # the mode that /lora/reload was given
        self.model = self.base_name = self.base = None
        self.own = OwnGeneration()
        self.started, self.warned = False, set()
        self.refusal: LoraError | None = None
        self.starting, self.reloading = threading.RLock(), threading.Lock()

    def of(self, advisor: str | None) -> Adapter | None:
        return self.table.get(advisor) or self.table.get(EVERYONE)

    def load(self) -> None:
        """Read what the flags name; fills table, mode and problem. LoraError where fine_tuned cannot be served."""
        # without --model_mode the configuration decides; until it is read, take it for the stricter
        self.mode = self.wanted_mode("fine_tuned" if flags.model_config else None)
        self.split, self.problem = flags.ab_test_split, None
        try:
            if flags.use_fine_tuned and flags.model_mode not in (None, "fine_tuned"):
                self.mode = "fine_tuned"
                raise LoraError(f"--use_fine_tuned and --model_mode {flags.model_mode} contradict each other")
            if self.mode != "base" and not flags.lora_path and not flags.model_config:
                raise LoraError(f"--model_mode {self.mode} needs --lora_path or --model_config")
            sources, implied = find_sources(flags.lora_path, flags.model_config)
            self.mode = self.wanted_mode(implied)
            # with --lora_path a request may ask for the adapter also where the base is the default
            self.table = self.read(sources) if self.mode != "base" or flags.lora_path else {}
            self._say_what_waits(sources)
        except LoraError as error:
            self.fail(error)

    def _say_what_waits(self, sources: dict[str, Source]) -> None:
        waiting = unpromoted(Path(flags.lora_path).expanduser()) if flags.lora_path else []
        if waiting:
            say(logging.WARNING, f"{flags.lora_path}: no version was put in use for {', '.join(waiting)} (no "
                f"{RECORD}), so the base answers for them; promote one, or name its folder")  # fmt: skip
        elif self.mode != "base" and not sources:
            say(logging.WARNING, "no version is in use: the base answers everything")

    def wanted_mode(self, implied: str | None) -> str:
        return flags.model_mode or ("fine_tuned" if flags.use_fine_tuned else implied or "base")

    def read(self, sources: dict[str, Source]) -> dict[str, Adapter]:
        """Return the adapters, those that are in use already taken over as they are; LoraError names all that fail."""
        loaded, table, problems = {adapter.digest: adapter for adapter in self.table.values()}, {}, []
        for advisor, source in sources.items():
            try:
                adapter = read_adapter(source, flags.lora_scale)
                known = loaded.get(adapter.digest)
                if known and (known.version, known.path) == (adapter.version, adapter.path):
                    adapter = known
                if adapter.breaker is None:
                    adapter.breaker = Breaker(flags.breaker_window, flags.breaker_bound)
                table[advisor] = adapter
            except LoraError as error:
                problems.append(str(error))
        if problems:
            raise LoraError(first_of(problems))
        return table

    def fail(self, error: LoraError) -> None:
        """Refuse in fine_tuned mode; in the others serve the base and log it."""
        if self.mode == "fine_tuned":
            self.refusal = error
            raise error
        self.table, self.problem = {}, str(error)
        say(logging.ERROR, f"THE ADAPTER IS NOT IN USE, the base answers everything: {error}")

    def adopt(self, model, processor, name: str | None) -> None:
        """Take over the model that the service has just loaded and prepare it for the adapters."""
        self.begin()
        if self._is_another(model, name):
            say(logging.INFO, f"{name}: another model than the served one; it answers as it is, without adapters")
            return
        self.model = model
        self.own.adopt(model, processor, name)
        self.base_name = name or self.base_name
        try:
            self.fit(self.table)
        except LoraError as error:
            self.fail(error)

    def _is_another(self, model, name: str | None) -> bool:
        """Tell whether this is not the model to serve: that one is known already, and the adapters do not fit this."""
        named = name is not None and self.base_name is not None and str(name) != str(self.base_name)
        if self.model is None and not (named and read_base(str(self.base_name)) is not None):
            return False
        try:
            base = read_base(str(name)) if name is not None else None
            for adapter in distinct(self.table):
                check_base(adapter, base)
                check_layers(model, adapter)
        except LoraError:
            return True
        return named and not self.table

    def begin(self) -> None:
        """Load once; a service thread that loads the model early may call this before `start`, or at the same time."""
        with self.starting:
            if self.refusal is not None:
                raise self.refusal
            if not self.started:
                self.base_name = getattr(flags.service, "mlx_model", None)
                self.load()
                self.started = True

    def fit(self, table: dict[str, Adapter]) -> None:
        """Check adapters against the served model's files and, once it is loaded, its layers."""
        if not table or (self.base_name is None and self.model is None):  # nothing to check against yet
            return
        if self.base_name and (self.base is None or self.base.fingerprint["name"] != str(self.base_name)):
            self.base = read_base(str(self.base_name))
        for adapter in distinct(table):
            for warning in check_base(adapter, self.base):
                if warning not in self.warned:
                    say(logging.WARNING, warning)
                self.warned.add(warning)
            if self.model is not None:
                make_switchable(self.model, adapter)
                self.own.prepare(adapter)

    def reload(self, mode: str | None = None, split: float | None = None) -> dict:
        """Read the sources again and swap what has changed; requests in progress keep the adapter they began with."""
        with self.reloading:
            before = {advisor: adapter.version for advisor, adapter in self.table.items()}
            sources, implied = find_sources(flags.lora_path, flags.model_config)
            asked = mode or self.asked  # a mode that was set by hand stays until another one is
            mode = asked or self.wanted_mode(implied)
            table = {} if asked == "base" or (mode == "base" and not flags.lora_path) else self.read(sources)
            self.fit(table)
            self.table, self.mode, self.problem, self.refusal, self.asked = table, mode, None, None, asked
            self.split = self.split if split is None else split
        after = {advisor: adapter.version for advisor, adapter in table.items()}
        say(logging.INFO, f"reloaded: {mode}, {after or 'no adapter'} (before: {before or 'no adapter'})")
        return {"status": "reloaded", "model_mode": mode, "adapters": after, "before": before}

    def health(self) -> dict:
        """Return what /health says of them."""
        adapters = {
            advisor: {
                "path": adapter.path,
                "version": adapter.version,
                "rank": adapter.ranks[0] if len(adapter.ranks) == 1 else adapter.ranks,
                "applied": self.own.ways.get(adapter.digest, "by mlx-vlm's own generation" if self.model else None),
                "megabytes": round(adapter.nbytes / 1e6, 1),
                "trained_on": (adapter.trained_on or {}).get("name"),
                "breaker": adapter.breaker.state(),
            }
            for advisor, adapter in self.table.items()
        }
        only = next(iter(adapters.values())) if len(adapters) == 1 else {}
        return {
            "model_mode": self.mode,
            "problem": self.problem,
            "adapter_path": only.get("path") or flags.lora_path or flags.model_config,
            "version": only.get("version"),
            "rank": only.get("rank"),
            "base_fingerprint": self.base and self.base.fingerprint,
            "adapters": adapters,
            "breaker": "open" if any(a["breaker"]["state"] == "open" for a in adapters.values()) else "closed",
        }
