"""The metrics each API server counts of its own requests; summed over API servers on the public port. Pure."""

from __future__ import annotations

from typing import Final

from metrics.catalogue.metric import (
    COUNTER,
    ENDED_REASONS,
    FINISHED_REASONS,
    GAUGE,
    HANDLERS,
    HISTOGRAM,
    METHODS,
    REJECTION_REASONS,
    STATUSES,
    SUMMARY,
    UNDELIVERED_REASONS,
    Kind,
    Label,
    Metric,
    Scope,
)

_FINISHED: Final = (Label("finished_reason", FINISHED_REASONS),)


def _request(
    kind: Kind, name: str, unit: str, text: str, labels: tuple[Label, ...] = (), buckets: str | None = None
) -> Metric:
    return Metric(name=name, kind=kind, scope=Scope.REQUEST, help=text, unit=unit, labels=labels, buckets=buckets)


def _http(
    kind: Kind, name: str, unit: str, text: str, labels: tuple[Label, ...] = (), buckets: str | None = None
) -> Metric:
    return Metric(
        name=name,
        kind=kind,
        scope=Scope.REQUEST,
        help=text,
        unit=unit,
        labels=labels,
        buckets=buckets,
        has_model=False,
        has_engine=False,
    )


REQUEST_METRICS: Final = (
    _request(
        COUNTER,
        "vllm:request_success_total",
        "requests",
        "Requests that ended, counted by their API server at their end, with n > 1 each sequence as one, as in vLLM; "
        "aborted and failed ones under abort and error.",
        _FINISHED,
    ),
    _request(
        HISTOGRAM,
        "vllm:time_to_first_token_seconds",
        "seconds",
        "Time from a request's arrival until the first token, with n > 1 of each sequence, both at the API server, "
        "observed as it happens.",
        buckets="ttft",
    ),
    _request(
        HISTOGRAM,
        "vllm:inter_token_latency_seconds",
        "seconds",
        "Time between two successive tokens of a sequence, by the engine's clock, observed as it happens.",
        buckets="itl",
    ),
    _request(
        HISTOGRAM,
        "vllm:request_time_per_output_token_seconds",
        "seconds",
        "Decode time over generated tokens less one, of each finished sequence; 0 for a single token.",
        buckets="itl",
    ),
    _request(
        HISTOGRAM,
        "vllm:e2e_request_latency_seconds",
        "seconds",
        "Time from a request's arrival until the end of each finished sequence, both at the API server.",
        buckets="latency",
    ),
    _request(
        HISTOGRAM,
        "vllm:request_queue_time_seconds",
        "seconds",
        "Time a finished sequence spent in the engine before it was first scheduled.",
        buckets="latency",
    ),
    _request(
        HISTOGRAM,
        "vllm:request_prefill_time_seconds",
        "seconds",
        "Time from a finished sequence's first scheduling until its first token, by the engine's clock.",
        buckets="latency",
    ),
    _request(
        HISTOGRAM,
        "vllm:request_decode_time_seconds",
        "seconds",
        "Time from a finished sequence's first token until its last, by the engine's clock.",
        buckets="latency",
    ),
    _request(
        HISTOGRAM,
        "vllm:request_inference_time_seconds",
        "seconds",
        "Time from a finished sequence's first scheduling until its last token, by the engine's clock.",
        buckets="latency",
    ),
    _request(
        HISTOGRAM,
        "vllm:request_prompt_tokens",
        "tokens",
        "Prompt tokens of each finished sequence: with n > 1 those of the request, n times.",
        (),
        "request_tokens",
    ),
    _request(
        HISTOGRAM,
        "vllm:request_generation_tokens",
        "tokens",
        "Tokens generated in each finished sequence.",
        buckets="request_tokens",
    ),
    _request(
        HISTOGRAM,
        "vllm:request_prefill_kv_computed_tokens",
        "tokens",
        "Prompt tokens of each finished sequence that were not found in the prefix cache.",
        buckets="request_tokens",
    ),
    _request(
        HISTOGRAM,
        "vllm:request_max_num_generation_tokens",
        "tokens",
        "The most tokens that any one sequence of a finished request generated.",
        buckets="request_tokens",
    ),
    _request(HISTOGRAM, "vllm:request_params_n", "sequences", "The n parameter of each finished request.", buckets="n"),
    _request(
        HISTOGRAM,
        "vllm:request_params_max_tokens",
        "tokens",
        "The effective max_tokens of each finished sequence.",
        buckets="request_tokens",
    ),
    _request(
        HISTOGRAM,
        "vllm:request_num_preemptions",
        "preemptions",
        "Preemptions each finished sequence went through.",
        buckets="preemptions",
    ),
    _request(
        COUNTER,
        "wholebatch:request_ended_total",
        "requests",
        "Whole requests that ended, one whatever n is, by the gravest reason of their sequences.",
        _FINISHED,
    ),
    _request(
        HISTOGRAM,
        "wholebatch:request_time_to_first_token_seconds",
        "seconds",
        "Time from a request's arrival until the first token of any of its sequences, both at the API server.",
        buckets="ttft",
    ),
    _request(
        HISTOGRAM,
        "wholebatch:request_latency_seconds",
        "seconds",
        "Time from a request's arrival until all of its sequences have ended and its answer is complete.",
        buckets="latency",
    ),
    _request(
        HISTOGRAM,
        "wholebatch:request_output_tokens",
        "tokens",
        "Tokens generated for each finished request, over all of its sequences.",
        buckets="request_tokens",
    ),
    Metric(
        name="vllm:admission_rejections_total",
        kind=COUNTER,
        scope=Scope.REQUEST,
        help="Requests an API server refused at the door, by the limit they would have passed.",
        unit="requests",
        labels=(Label("reason", REJECTION_REASONS),),
        has_engine=False,
    ),
    _request(
        COUNTER,
        "wholebatch:received_tokens_total",
        "tokens",
        "Generated tokens in all messages that API servers received from the engine, its request still known or not.",
    ),
    _request(
        COUNTER,
        "wholebatch:delivered_tokens_total",
        "tokens",
        "Generated tokens handed to a client's socket, counted just before; what usage.completion_tokens reports.",
    ),
    _request(
        COUNTER,
        "wholebatch:undelivered_tokens_total",
        "tokens",
        "Received tokens that no client will get: the client had gone, they came after the answer's end (a stop string "
        "or max_tokens 0), the request failed, or the API server died.",
        (Label("reason", UNDELIVERED_REASONS),),
    ),
    _request(
        COUNTER, "wholebatch:sequences_submitted_total", "requests", "Sequences that API servers sent to the engine."
    ),
    _request(
        COUNTER,
        "wholebatch:sequences_ended_total",
        "requests",
        "Sequences that ended, as their API server saw it; server_lost for those open when an API server died.",
        (Label("finished_reason", ENDED_REASONS),),
    ),
    _request(
        GAUGE,
        "wholebatch:api_server_requests_in_flight",
        "requests",
        "Sequences that API servers have sent to the engine and still wait for.",
    ),
    _request(
        GAUGE,
        "wholebatch:api_server_prefill_tokens",
        "tokens",
        "Prompt tokens of the sequences in flight that have had no token yet, as API servers see it.",
    ),
    _request(
        COUNTER,
        "wholebatch:stale_snapshots_total",
        "snapshots",
        "Snapshots of the engine that API servers received and dropped, being no newer than the one held.",
    ),
    _http(
        COUNTER,
        "http_requests_total",
        "requests",
        "HTTP requests answered by API servers, by route template and status class; metrics, health and status routes "
        "are left out.",
        (Label("method", METHODS), Label("handler", HANDLERS), Label("status", STATUSES)),
    ),
    _http(
        HISTOGRAM,
        "http_request_duration_seconds",
        "seconds",
        "Time an API server took from an HTTP request's headers to the end of its answer, by route template.",
        (Label("method", METHODS), Label("handler", HANDLERS)),
        buckets="http",
    ),
    _http(
        HISTOGRAM,
        "http_request_duration_highr_seconds",
        "seconds",
        "The same time over all routes and methods, in finer buckets.",
        buckets="http_fine",
    ),
    _http(
        SUMMARY,
        "http_request_size_bytes",
        "bytes",
        "Bytes of HTTP requests as their Content-Length says, 0 where there is none, by route template.",
        (Label("handler", HANDLERS),),
    ),
    _http(
        SUMMARY,
        "http_response_size_bytes",
        "bytes",
        "Bytes of answers as their Content-Length says, 0 where there is none (a stream), by route template.",
        (Label("handler", HANDLERS),),
    ),
)
