"""Reports of the engine on itself: gauges and counters for the API side, and log lines."""

import dataclasses
import logging
import mmap
import time

from sgl_jax.engine.grammar_compiles import Grammars
from sgl_jax.engine.messages import DraftCounts, Stats
from sgl_jax.observability.log import decode_line, low_acceptance_line, prefill_line
from sgl_jax.scheduler.scheduler import Scheduler
from sgl_jax.step_plan import StepPlan

logger = logging.getLogger(__name__)

_INTERVAL_S = 0.25
_ENOUGH_DRAFTS, _LOWEST_RATE = 200, 0.05  # the share is that of a row's first drafts which are right


class Statistics:
    def __init__(
        self,
        scheduler: Scheduler,
        decode_log_interval: int,
        draft_model: str,
        simulated: bool,
        grammars: Grammars | None,
    ):
        self.speed = Speedometer(decode_log_interval)
        self.steps = StepClock()
        self._scheduler, self._simulated, self._grammars = scheduler, simulated, grammars
        self._watched = draft_model  # empty: there is none, or it has been warned of
        self._drafts = self._drafts_before = DraftCounts()  # the last log interval's, and all until its end
        self._due = 0.0

    def take_due(self, compiles_after_ready: int, num_compiling: int, *, idle: bool) -> Stats | None:
        """Return them every _INTERVAL_S seconds, and always when the engine falls idle; None between."""
        now = time.monotonic()
        if now < self._due and not idle:
            return None
        self._due = now + _INTERVAL_S
        self._warn_of_low_acceptance()
        return self._stats(compiles_after_ready, num_compiling, resident_bytes())

    def pause(self) -> None:
        """Leave out the time from now until the next step, since nothing runs."""
        self.speed.pause()
        self.steps.pause()

    def _stats(self, compiles_after_ready: int = 0, num_compiling: int = 0, resident: int = 0) -> Stats:
        s = self._scheduler
        return Stats(
            num_running=s.num_running,
            num_waiting=len(s.waiting),
            kv_usage=s.kv_usage,
            cached_usage=s.cached_usage,
            gen_throughput=self.speed.tokens_per_s,
            compiles_after_ready=compiles_after_ready,
            num_compiling=num_compiling,
            step_seconds=self.steps.seconds,
            decode_steps=self.steps.decode_steps,
            decode_step_seconds=self.steps.decode_seconds,
            resident_bytes=resident,
            spec_accept_length=self._drafts.accept_length,
            spec_accept_rate=self._drafts.accept_rate,
            adapters_on_device=s.adapters.num_used,
            adapter_loads=s.adapters.num_loads,
            grammars_compiled=self._grammars.num_compiled if self._grammars else 0,
            grammar_compile_seconds=self._grammars.compile_seconds if self._grammars else 0.0,
            grammar_masks=s.grammars.num_masks,
            grammar_mask_seconds=s.grammars.mask_seconds,
            **dataclasses.asdict(s.counters),
        )

    def log(self, plan: StepPlan) -> None:
        """Log a line for a step with prompts, and one for every interval of decode steps."""
        if not plan.from_device.all():
            prompts = ~plan.from_device
            new = int(prompts.sum()), int(plan.num_new[prompts].sum())
            logger.info(prefill_line(self._stats(), *new, plan.num_cached_tokens))
        elif self.speed.interval_is_over():
            c = self._scheduler.counters
            total = DraftCounts(c.draft_steps, c.drafted_tokens, c.accepted_drafts)
            self._drafts, self._drafts_before = total.since(self._drafts_before), total
            logger.info(decode_line(self._stats(), self._scheduler.num_running_tokens, simulated=self._simulated))

    def _warn_of_low_acceptance(self) -> None:
        c = self._scheduler.counters
        if not self._watched or c.drafted_tokens < _ENOUGH_DRAFTS:
            return
        if (accepted := c.accepted_per_position[0]) < _LOWEST_RATE * c.draft_steps:
            logger.warning("%s", low_acceptance_line(self._watched, accepted, c.draft_steps, _LOWEST_RATE))
            self._watched = ""


class StepClock:
    """Seconds that steps took: each from the end of the one before it, the first after a pause from its launch."""

    def __init__(self) -> None:
        self.seconds = self.decode_seconds = 0.0
        self.decode_steps = 0  # steps without prompt tokens
        self._since: float | None = None  # None: nothing has been launched since the last pause

    def launched(self) -> None:
        if self._since is None:
            self._since = time.perf_counter()

    def collected(self, *, decodes: bool) -> float | None:
        """Count a step that has ended. Return its seconds, None if its begin is not known."""
        now, since = time.perf_counter(), self._since
        taken = 0.0 if since is None else now - since
        self.seconds += taken
        if decodes:
            self.decode_steps += 1
            self.decode_seconds += taken
        self._since = now
        return None if since is None else taken

    def pause(self) -> None:
        self._since = None


def resident_bytes() -> int:
    """Return how much memory this process holds; 0 where the system does not tell (all but Linux)."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * mmap.PAGESIZE
    except OSError:
        return 0


class Speedometer:
    """Generated tokens per second over the last `interval` decode steps."""

    def __init__(self, interval: int):
        self.tokens_per_s = 0.0
        self._interval = interval
        self._steps = self._tokens = 0
        self._since: float | None = None  # None: nothing has run since the last pause

    def count(self, num_tokens: int) -> None:
        if self._since is None:
            self._since = time.monotonic()
            return  # the time that these tokens took is not known
        self._tokens += num_tokens

    def pause(self) -> None:
        """Leave out the time from now until the next token, since nothing runs."""
        self._steps = self._tokens = 0
        self._since = None

    def interval_is_over(self) -> bool:
        """Count a decode step; at the end of an interval update tokens_per_s and start the next one."""
        self._steps += 1
        if self._steps < self._interval or self._since is None:
            return False
        now = time.monotonic()
        self.tokens_per_s = self._tokens / (now - self._since)
        self._steps = self._tokens = 0
        self._since = now
        return True
