"""vLLM's scheduler with our witness in it: what `--scheduler-cls engine.vllm.make_scheduler` names.

vLLM calls what it resolves and uses the result as its scheduler. So this picks the class that vLLM would have picked,
makes a subclass of it that counts each batch when it is scheduled and once more when it has run, and returns an
instance. Whatever fails of ours is counted and logged once, and vLLM goes on; where our part cannot start at all, one
line says why and vLLM's own scheduler is returned.
"""

from __future__ import annotations

import copy
import importlib
import logging
import os
import time
from typing import Any, Final

from engine.schedule import Console, Recorder
from engine.vllm.counting import BatchCounter
from metrics.bulkhead import Bulkhead
from metrics.files import TallyStore
from metrics.usage import ProcessMetrics
from metrics.vllm import CoreFacts, HookError, hook_bulkhead, open_core

log = logging.getLogger("vllm.wholebatch")  # below vLLM's own logger, so that its handlers print it

SCHEDULER_VARIABLE: Final = "WHOLEBATCH_VLLM_SCHEDULER"  # a --scheduler-cls that the operator gave
PROCESS_INTERVAL_S: Final = 1.0
_WITNESS: Final = "_wholebatch_witness"


def make_scheduler(*args: Any, **kwargs: Any) -> Any:
    """An instance of vLLM's scheduler that counts; `vllm_config` is among the arguments."""
    vllm_config = kwargs.get("vllm_config", args[0] if args else None)
    base = _scheduler_class(vllm_config)
    try:
        store = open_core(_engine_index(vllm_config), _facts(vllm_config))
        witness = Witness(store, is_quiet=_has_own_line(vllm_config))
        kind = type(f"Counting{base.__name__}", (_Hooks, base), {"__module__": __name__})
    except Exception as error:  # noqa: BLE001 - vLLM must start whatever is wrong with our part
        log.error("event=vllm_hook_disabled error=%r", str(error))
        return base(*args, **kwargs)
    scheduler = kind(*args, **kwargs)
    scheduler.__dict__[_WITNESS] = witness
    return scheduler


class Witness:
    """Counts one engine core's iterations into its tally."""

    def __init__(self, store: TallyStore, *, is_quiet: bool) -> None:
        """`is_quiet`: vLLM writes a line of its own to the console now and then."""
        tally = store.tally
        self.bulkhead: Bulkhead = hook_bulkhead(tally, log)
        self._store = store
        self._counter = BatchCounter()
        self._recorder = Recorder(tally, tally.layout, num_api_servers=1)
        self._process = ProcessMetrics(tally)
        self._process_due = 0.0
        prompt_counter = "wholebatch:prompt_tokens_computed_total"
        self._console = None if is_quiet else Console(tally, time.monotonic(), prompt_counter=prompt_counter)

    def preempted(self, request: Any) -> None:
        self._counter.preempted(request.request_id, request.num_computed_tokens)

    def scheduled(self, output: Any, requests: Any, started: float) -> None:
        self._counter.scheduled(output, requests, started, time.monotonic())

    def updated(self, output: Any, answers: Any, ran_at: float) -> None:
        """The batch has run: one observation of it, committed before vLLM sends its tokens."""
        num_generated = sum(len(one.new_token_ids) for answer in answers.values() for one in answer.outputs)
        iteration = self._counter.updated(output, num_generated, ran_at)
        if iteration is None:
            return
        self._recorder.iteration(iteration.counts, iteration.duration_s)
        self._recorder.stages(
            schedule_s=iteration.schedule_s, run_s=iteration.run_s, record_s=time.monotonic() - ran_at
        )
        if ran_at >= self._process_due:
            self._process_due = ran_at + PROCESS_INTERVAL_S
            with self.bulkhead.around("process"):
                self._process.update()
        self._store.commit()

    def tell(self, scheduler: Any, now: float) -> None:
        """The line of a whole engine core, which vLLM leaves out where it has several API servers."""
        if self._console is None:
            return
        running, waiting = len(scheduler.running), len(scheduler.waiting)
        self._recorder.gauges(running, waiting, 0, scheduler.kv_cache_manager.usage)
        line = self._console.line(now)
        if line is not None:
            log.info("%s", line)


class _Hooks:
    """Goes before vLLM's scheduler class. Each method does what vLLM's does, and tells the witness."""

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        started = time.monotonic()
        output = super().schedule(*args, **kwargs)  # type: ignore[misc]
        witness = self.__dict__.get(_WITNESS)
        if witness is not None:
            with witness.bulkhead.around("schedule"):
                witness.scheduled(output, self.requests, started)  # type: ignore[attr-defined]
        return output

    def update_from_output(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        ran_at = time.monotonic()
        answers = super().update_from_output(scheduler_output, *args, **kwargs)  # type: ignore[misc]
        witness = self.__dict__.get(_WITNESS)
        if witness is not None:
            with witness.bulkhead.around("update"):
                witness.updated(scheduler_output, answers, ran_at)
            with witness.bulkhead.around("console"):
                witness.tell(self, ran_at)
        return answers

    def _preempt_request(self, request: Any, *args: Any, **kwargs: Any) -> Any:
        witness = self.__dict__.get(_WITNESS)
        if witness is not None:
            with witness.bulkhead.around("preempt"):
                witness.preempted(request)
        return super()._preempt_request(request, *args, **kwargs)  # type: ignore[misc]


def _scheduler_class(vllm_config: Any) -> Any:
    """The class that vLLM would have taken without us."""
    if named := os.environ.get(SCHEDULER_VARIABLE):
        module, _, name = named.rpartition(".")
        return getattr(importlib.import_module(module), name)
    config = copy.copy(vllm_config.scheduler_config)
    config.scheduler_cls = None
    return config.get_scheduler_cls()


def _engine_index(vllm_config: Any) -> int:
    """What vLLM's label `engine` says: with data parallelism the rank is reset, the index is not."""
    parallel = vllm_config.parallel_config
    index = getattr(parallel, "data_parallel_index", None)
    return int(parallel.data_parallel_rank if index is None else index)


def _has_own_line(vllm_config: Any) -> bool:
    """Whether vLLM writes its statistics to the console itself: with one API server alone."""
    return int(getattr(vllm_config.parallel_config, "_api_process_count", 1)) == 1


def _facts(vllm_config: Any) -> CoreFacts:
    """Raises HookError where this vLLM does not say what its own histogram is labelled with."""
    try:
        names = vllm_config.model_config.served_model_name
        custom = getattr(vllm_config.observability_config, "custom_histogram_buckets", None) or {}
        buckets = importlib.import_module("vllm.v1.metrics.buckets")
        defaults = buckets.histogram_buckets("iteration_tokens")
    except (AttributeError, ImportError) as error:
        raise HookError(f"this version of vLLM is not known: {error}") from error
    return CoreFacts.of(names if isinstance(names, str) else names[0], custom, [float(bound) for bound in defaults])
