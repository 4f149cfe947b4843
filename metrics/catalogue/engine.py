"""The metrics an engine counts, being their only witness; its exporter exports them. Pure."""

from __future__ import annotations

from typing import Final

from metrics.catalogue.metric import (
    CACHE_SOURCES,
    COUNTER,
    FINISHED_REASONS,
    GAUGE,
    HISTOGRAM,
    LOST_REASONS,
    PHASES,
    PROMPT_SOURCES,
    SLEEP_STATES,
    SNAPSHOT_RESULTS,
    STAGES,
    WAITING_REASONS,
    Kind,
    Label,
    Metric,
    Scope,
)

_FINISHED: Final = (Label("finished_reason", FINISHED_REASONS),)
_PHASE: Final = (Label("phase", PHASES),)


def _engine(
    kind: Kind,
    name: str,
    unit: str,
    text: str,
    labels: tuple[Label, ...] = (),
    buckets: str | None = None,
    starts_at_one: tuple[str, ...] = (),
) -> Metric:
    return Metric(
        name=name,
        kind=kind,
        scope=Scope.ENGINE,
        help=text,
        unit=unit,
        labels=labels,
        buckets=buckets,
        starts_at_one=starts_at_one,
    )


ENGINE_METRICS: Final = (
    _engine(GAUGE, "vllm:num_requests_running", "requests", "Sequences in the engine's running batch."),
    _engine(
        GAUGE,
        "vllm:num_requests_waiting",
        "requests",
        "Sequences the engine has accepted and does not run now, preempted ones included.",
    ),
    _engine(
        GAUGE,
        "vllm:num_requests_waiting_by_reason",
        "requests",
        "Waiting sequences by what they wait for: capacity (no room in the batch or the KV cache), deferred (held back "
        "for another reason). The parts sum to vllm:num_requests_waiting.",
        (Label("reason", WAITING_REASONS),),
    ),
    _engine(
        GAUGE,
        "vllm:kv_cache_usage_perc",
        "ratio",
        "Share of the engine's KV-cache blocks in use, 0 to 1; blocks that only the prefix cache holds are free.",
    ),
    _engine(
        GAUGE,
        "vllm:engine_sleep_state",
        "",
        "1 for the state the engine's memory is in: awake, weights_offloaded or discard_all.",
        (Label("sleep_state", SLEEP_STATES),),
        starts_at_one=("awake",),
    ),
    _engine(
        COUNTER,
        "vllm:prefix_cache_queries_total",
        "tokens",
        "Prompt tokens looked up in the engine's prefix cache, once a sequence, when it is first admitted.",
    ),
    _engine(
        COUNTER,
        "vllm:prefix_cache_hits_total",
        "tokens",
        "Prompt tokens found in the engine's prefix cache, of those looked up.",
    ),
    _engine(
        COUNTER,
        "vllm:external_prefix_cache_queries_total",
        "tokens",
        "Prompt tokens looked up in a KV cache outside the engine. There is none: always 0.",
    ),
    _engine(
        COUNTER,
        "vllm:external_prefix_cache_hits_total",
        "tokens",
        "Prompt tokens found in a KV cache outside the engine. There is none: always 0.",
    ),
    _engine(
        COUNTER,
        "vllm:mm_cache_queries_total",
        "items",
        "Multi-modal items looked up in the engine's cache. Only text is served: always 0.",
    ),
    _engine(
        COUNTER,
        "vllm:mm_cache_hits_total",
        "items",
        "Multi-modal items found in the engine's cache. Only text is served: always 0.",
    ),
    _engine(
        COUNTER,
        "vllm:num_preemptions_total",
        "preemptions",
        "Times the engine took a running sequence's KV blocks away, counted when it happens.",
    ),
    _engine(
        COUNTER,
        "vllm:prompt_tokens_total",
        "tokens",
        "Prompt tokens of sequences, counted by the engine when a sequence's prefill completes, cached ones included.",
    ),
    _engine(
        COUNTER,
        "vllm:prompt_tokens_by_source_total",
        "tokens",
        "vllm:prompt_tokens_total by where the keys and values came from: computed here, found in the prefix cache, or "
        "transferred from outside.",
        (Label("source", PROMPT_SOURCES),),
    ),
    _engine(
        COUNTER,
        "vllm:prompt_tokens_cached_total",
        "tokens",
        "The part of vllm:prompt_tokens_total that was not computed: found in the prefix cache or transferred.",
    ),
    _engine(
        COUNTER,
        "vllm:prompt_tokens_cached_by_source_total",
        "tokens",
        "Prompt tokens found in a KV cache, by its tier. device is the engine's own prefix cache, as in "
        "vllm:prefix_cache_hits_total; there is no other: the rest are always 0.",
        (Label("source", CACHE_SOURCES),),
    ),
    _engine(
        COUNTER,
        "vllm:generation_tokens_total",
        "tokens",
        "Tokens the engine sampled and appended to a sequence, counted in the iteration that sampled them.",
    ),
    _engine(
        COUNTER,
        "vllm:estimated_flops_per_gpu_total",
        "",
        "Floating point operations of the model on each GPU, estimated. They are not estimated here: always 0.",
    ),
    _engine(
        COUNTER,
        "vllm:estimated_read_bytes_per_gpu_total",
        "bytes",
        "Bytes that the model read from each GPU's memory, estimated. They are not estimated here: always 0.",
    ),
    _engine(
        COUNTER,
        "vllm:estimated_write_bytes_per_gpu_total",
        "bytes",
        "Bytes that the model wrote to each GPU's memory, estimated. They are not estimated here: always 0.",
    ),
    _engine(
        HISTOGRAM,
        "vllm:iteration_tokens_total",
        "tokens",
        "Prompt tokens computed (recomputed ones included) plus tokens generated in one iteration of the engine, whole "
        "batch: exactly one observation an iteration, at any number of API servers.",
        buckets="iteration_tokens",
    ),
    _engine(
        COUNTER,
        "wholebatch:iterations_total",
        "iterations",
        "Iterations in which the engine ran a batch, by what was in it: prefill only, decode only, or both.",
        _PHASE,
    ),
    _engine(
        HISTOGRAM,
        "wholebatch:iteration_scheduled_tokens",
        "tokens",
        "Tokens the model computed in one iteration, one observation an iteration.",
        buckets="iteration_tokens",
    ),
    _engine(
        HISTOGRAM,
        "wholebatch:iteration_prefill_tokens",
        "tokens",
        "Prefill tokens the model computed in one iteration; observed in iterations that have any.",
        buckets="iteration_tokens",
    ),
    _engine(
        HISTOGRAM,
        "wholebatch:iteration_decode_tokens",
        "tokens",
        "Decode tokens the model computed in one iteration; observed in iterations that have any.",
        buckets="iteration_tokens",
    ),
    _engine(
        HISTOGRAM,
        "wholebatch:iteration_requests",
        "requests",
        "Sequences in the batch of one iteration, one observation an iteration.",
        buckets="batch",
    ),
    _engine(
        HISTOGRAM,
        "wholebatch:iteration_preemptions",
        "preemptions",
        "Preemptions made while one iteration was scheduled; observed in iterations that have any.",
        buckets="n",
    ),
    _engine(
        HISTOGRAM,
        "wholebatch:iteration_duration_seconds",
        "seconds",
        "Time from the start of an iteration's scheduling until its sampled tokens are on the host, by its phase.",
        _PHASE,
        buckets="step_time",
    ),
    _engine(
        COUNTER,
        "wholebatch:iteration_stage_seconds_total",
        "seconds",
        "Time the engine's loop spent in each stage; record and send of an iteration are booked with the next commit.",
        (Label("stage", STAGES),),
    ),
    _engine(
        COUNTER,
        "wholebatch:prompt_tokens_computed_total",
        "tokens",
        "Prompt tokens the engine computed for the first time, counted in the iteration that computes them.",
    ),
    _engine(
        COUNTER,
        "wholebatch:recomputed_tokens_total",
        "tokens",
        "Scheduled tokens at positions that the sequence had computed or found cached before a preemption.",
    ),
    _engine(
        COUNTER,
        "wholebatch:sampling_faults_total",
        "sequences",
        "Sequences that ended by `error` because no next token could be sampled for them.",
    ),
    _engine(
        COUNTER,
        "wholebatch:lost_tokens_total",
        "tokens",
        "Generated tokens that were sent to an API server (by index) and never received, by which side's end lost "
        "them; booked by the engine when the two next meet.",
        (Label("reason", LOST_REASONS), Label("api_server")),
    ),
    _engine(
        COUNTER,
        "wholebatch:tokens_sent_total",
        "tokens",
        "Generated tokens the engine sent to each API server (by index), counted before they are sent.",
        (Label("api_server"),),
    ),
    _engine(COUNTER, "wholebatch:sequences_accepted_total", "requests", "Sequences the engine took in."),
    _engine(
        COUNTER,
        "wholebatch:sequences_finished_total",
        "requests",
        "Sequences that ended, as the engine saw it; error for those open when an engine died.",
        _FINISHED,
    ),
    _engine(GAUGE, "wholebatch:exporter_term", "", "Number of the engine's present grant of the right to export."),
    _engine(GAUGE, "wholebatch:engine_incarnation", "", "How many times this engine has been started."),
    _engine(
        COUNTER,
        "wholebatch:snapshots_total",
        "snapshots",
        "Broadcasts of the engine's tally, by whether the socket took them.",
        (Label("result", SNAPSHOT_RESULTS),),
    ),
)
