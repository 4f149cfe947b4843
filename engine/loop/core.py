"""One engine without sockets: submits in, iterations run, outputs out. Pure, but for the runner and the clock given.

`engine.loop.loop` wraps it in a process; tests and benchmarks drive it directly. An API server is named by
(index, incarnation). The order of things within `step` and after it (P4):

    schedule -> run -> update -> record -> | the caller: commit -> send

Whoever calls `submit`, `abort`, `drop_api_server` or `step` commits before the effects leave the process. A request
that cannot run here is answered by an `Output` that finishes it with `error`, in the next `step`: it was accepted and
has finished, and is counted so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from engine.schedule import Batch, IterationCounts, Recorder, RequestState, Runner, SampledToken, Scheduler
from engine.wire import Finish, Output, Outputs, Start, Submit
from metrics.bulkhead import Bulkhead

ApiServer = tuple[int, int]  # (index, incarnation)


class EngineCore:
    """Scheduler, runner and recorder, and whose request is whose."""

    __slots__ = (
        "_bulkhead",
        "_by_request",
        "_clock",
        "_incarnation",
        "_next_sequence_id",
        "_on_sampling_fault",
        "_pending",
        "_recorder",
        "_runner",
        "_scheduler",
        "iteration_log",
        "on_iteration",
    )

    def __init__(  # noqa: PLR0913  its collaborators; the observers are optional and by name
        self,
        scheduler: Scheduler,
        runner: Runner,
        recorder: Recorder,
        clock: Callable[[], float],
        bulkhead: Bulkhead,
        *,
        incarnation: int = 1,
        iteration_log: Callable[[Batch], None] | None = None,
        on_iteration: Callable[[dict[str, Any]], None] | None = None,
        on_sampling_fault: Callable[[str], None] = lambda fault: None,
    ) -> None:
        self._scheduler = scheduler
        self._runner = runner
        self._recorder = recorder
        self._clock = clock
        self._incarnation = incarnation
        self._bulkhead = bulkhead
        self._on_sampling_fault = on_sampling_fault  # told why a sequence has no next token, for the log
        self._next_sequence_id = 0
        self._by_request: dict[ApiServer, dict[int, RequestState]] = {}  # unfinished, by the sender's own id
        self._pending: dict[ApiServer, list[Output]] = {}  # refusals, for the next step
        self.iteration_log = iteration_log  # called with every batch before it runs: a witness beside the recorder
        self.on_iteration = on_iteration  # called with a small record of every iteration; None costs nothing

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do."""
        return self._scheduler.has_work or bool(self._pending)

    # --- what arrives ---

    def submit(self, api_server: ApiServer, submit: Submit, now: float) -> None:
        """Queue n sequences."""
        refusal = self._scheduler.refusal(submit)
        if submit.engine_incarnation != self._incarnation:
            refusal = f"meant for engine incarnation {submit.engine_incarnation}, this is {self._incarnation}"
        for index in range(submit.n):
            self._recorder.accepted()
            request = RequestState(self._next_sequence_id, api_server, submit, now, index)
            self._next_sequence_id += 1
            self._take(request, refusal)
        self._set_gauges()

    def _take(self, request: RequestState, refusal: str | None) -> None:
        """One sequence: to the queue, or refused."""
        requests = self._by_request.setdefault(request.api_server, {})
        if request.request_id in requests:
            refusal = refusal or f"request id {request.request_id} is in use"
        if refusal is None:
            requests[request.request_id] = request
            self._scheduler.add(request)
            return
        request.finish_reason = "error"
        request.message = refusal
        self._recorder.finished("error")
        output = Output(request.request_id, 0, [], None, _finish(request), None)
        self._pending.setdefault(request.api_server, []).append(output)

    def abort(self, api_server: ApiServer, request_ids: Sequence[int]) -> None:
        """End these by `abort`, without an output: the sender knows. Unknown ids are none of its running requests."""
        requests = self._by_request.get(api_server, {})
        ended = []
        for request_id in request_ids:
            request = requests.pop(request_id, None)
            if request is None:
                continue
            aborted = self._scheduler.abort(request.sequence_id)
            assert aborted is request, f"sequence {request.sequence_id} has ended unnoticed"
            self._recorder.finished("abort")
            ended.append(request.sequence_id)
        if ended:
            self._runner.release(ended)
            self._set_gauges()

    def drop_api_server(self, api_server: ApiServer) -> None:
        """Abort what an API server that is gone has asked for, and forget it."""
        self.abort(api_server, list(self._by_request.get(api_server, ())))
        self._by_request.pop(api_server, None)
        self._pending.pop(api_server, None)

    # --- one iteration ---

    def step(self) -> dict[ApiServer, Outputs]:
        """Run one iteration, if there is anything to run, and return what to send to whom, all of it counted."""
        started = self._clock()
        batch = self._scheduler.schedule(started)
        outputs, self._pending = self._pending, {}
        at = started
        if batch is not None:
            at = self._iterate(batch, started, outputs)
        return {server: Outputs(self._incarnation, at, rows) for server, rows in outputs.items()}

    def _iterate(self, batch: Batch, started: float, outputs: dict[ApiServer, list[Output]]) -> float:
        """Run, update, record; add to `outputs`. Returns the instant when the tokens were on the host."""
        if self.iteration_log is not None:
            self.iteration_log(batch)
        scheduled_at = self._clock()
        sampled = self._runner.run(batch)
        at = self._clock()
        for error in batch.caught:
            self._bulkhead.caught("sampling", error)
        stepped = self._scheduler.update(batch, sampled)
        self._scheduler.observe(batch.counts, at - started)
        self._add_outputs(stepped, sampled, outputs)
        self._set_gauges()
        with self._bulkhead.around("record"):
            self._recorder.iteration(batch.counts, at - started)
            self._recorder.stages(
                schedule_s=scheduled_at - started, run_s=at - scheduled_at, record_s=self._clock() - at
            )
        if self.on_iteration is not None:
            self.on_iteration(self._describe(batch.counts, at - started))
        return at

    def _add_outputs(
        self,
        stepped: Sequence[RequestState],
        sampled: Sequence[SampledToken],
        outputs: dict[ApiServer, list[Output]],
    ) -> None:
        """One output for each sampled token or fault, by API server, tokens counted as sent; ended sequences are
        forgotten."""
        num_without_token = {server: len(rows) for server, rows in outputs.items()}
        ended = []
        for request, (token_id, logprobs, fault) in zip(stepped, sampled, strict=True):
            finish = start = None
            if request.finish_reason is not None:
                finish = _finish(request)
                ended.append(request.sequence_id)
                del self._by_request[request.api_server][request.request_id]
                self._recorder.finished(request.finish_reason)
            if request.num_preemptions != request.num_preemptions_told:
                start = _start(request)
            first_index = len(request.token_ids) - request.num_prompt_tokens - 1
            rows = None if logprobs is None else [logprobs]
            output = Output(request.request_id, first_index, [token_id], rows, finish, start)
            server = request.api_server
            if fault is not None:
                output = Output(request.request_id, first_index + 1, [], None, finish, start)
                num_without_token[server] = num_without_token.get(server, 0) + 1
                self._on_sampling_fault(fault)
            if server in outputs:
                outputs[server].append(output)
            else:
                outputs[server] = [output]
        for server, made in outputs.items():
            self._recorder.sent(server[0], len(made) - num_without_token.get(server, 0))
        if ended:
            self._runner.release(ended)

    def _set_gauges(self) -> None:
        scheduler = self._scheduler
        self._recorder.gauges(
            scheduler.num_running, scheduler.num_waiting_capacity, scheduler.num_waiting_deferred, scheduler.kv_usage
        )

    def _describe(self, counts: IterationCounts, duration_s: float) -> dict[str, Any]:
        """The live topic's record of one iteration."""
        return {
            "phase": counts.phase,
            "duration_s": duration_s,
            "num_requests": counts.num_requests,
            "num_prefill_tokens": counts.num_prefill_tokens,
            "num_decode_tokens": counts.num_decode_tokens,
            "num_iteration_tokens": counts.num_iteration_tokens,
            "num_generated_tokens": counts.num_generated_tokens,
            "num_recomputed_tokens": counts.num_recomputed_tokens,
            "num_preemptions": counts.num_preemptions,
            "num_running": self._scheduler.num_running,
            "num_waiting": self._scheduler.num_waiting_capacity + self._scheduler.num_waiting_deferred,
            "kv_usage": self._scheduler.kv_usage,
        }


def _finish(request: RequestState) -> Finish:
    """How a sequence ended, for its API server."""
    assert request.finish_reason is not None, f"sequence {request.sequence_id} has not ended"
    return Finish(
        reason=request.finish_reason,
        stop_token_id=request.stop_token_id,
        message=request.message,
    )


def _start(request: RequestState) -> Start:
    """The sequence's life so far, for its API server, which is told once and again after every preemption."""
    request.num_preemptions_told = request.num_preemptions
    return Start(request.arrived_at, request.scheduled_at, request.num_cached_tokens, request.num_preemptions)
