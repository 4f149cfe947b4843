"""What the operator chose, one frozen dataclass per owner; facts found at start travel elsewhere. Pure.

A flag is declared on the field that it fills: name, type, bounds, default and help stand here and nowhere else.
`engine.flags` makes the command line of it, `engine.wire` carries the parts to the children and checks the same bounds.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Final, Literal

from msgspec import Meta

from engine import default_model
from engine.bounds import Count, NumProcesses, Port, Positive, Text, seconds
from engine.options import Flag, Group, buckets, num_bytes, printable, url
from metrics.catalogue import FINE_LATENCY

API_KEY_VARIABLE: Final = "WHOLEBATCH_API_KEY"

# What may wait for an engine where the operator says nothing. Measured: 1.3 KiB a sequence, 40 bytes a prompt's token.
QUEUED_REQS: Final = 8192
QUEUED_TOKENS: Final = 4_194_304

Buckets = tuple[tuple[str, tuple[float, ...]], ...]  # (family, bounds)

_MODEL_HELP: Final = f"a Hugging Face directory or a .gguf file (default: {default_model.NAME}, fetched once)"
_KEY_HELP: Final = f"what clients must present; seen in `ps` at the start, better set {API_KEY_VARIABLE}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Which weights, how they are held, and what clients call them."""

    path: Annotated[Text, Flag(_MODEL_HELP, name="--model")]
    served_model_names: Annotated[
        tuple[str, ...],
        Flag(
            "what clients call it; the first one labels metrics (default: the file's or directory's name)",
            name="--served-model-name",
            metavar="NAME",
            parse=printable,
        ),
    ] = ()
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        Flag("of weights and KV cache (default: as fits model and device)"),
    ] = "auto"
    device: Annotated[Literal["auto", "cpu", "cuda"], Flag("what computes (default: a GPU where there is one)")] = (
        "auto"
    )
    quantization: Annotated[
        Literal["int8"] | None,
        Flag("hold and multiply the matrices as int8, on a CPU: faster, a little less exact (default: no)"),
    ] = None
    max_model_len: Annotated[Positive | None, Flag("longest context, in tokens (default: the model's)")] = None
    seed: Annotated[
        Count | None,
        Flag("fixes what requests without a seed draw, for each engine's each start (default: at random)"),
    ] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """Who is served next, and the limits of one iteration's batch."""

    scheduling_policy: Annotated[
        Literal["fcfs", "priority"],
        Flag(
            "who is served first: fcfs, who came first; priority, whose request says the lower priority"
            " (default: %(default)s)"
        ),
    ] = "fcfs"
    max_num_seqs: Annotated[Positive, Flag("sequences in a batch (default: %(default)s)")] = 256
    # None: what suits the device, and what the other limits need
    max_num_batched_tokens: Annotated[
        Positive | None, Flag("tokens computed in one iteration (default: 512 on a CPU, 2048 on a GPU)")
    ] = None
    enable_chunked_prefill: Annotated[bool, Flag("compute long prompts in parts (default: yes)")] = True
    long_prefill_token_threshold: Annotated[
        Count,
        Flag(
            "longest part of a prompt in one iteration; 0: only the budget limits it, and on a CPU, while others"
            " decode, how long these would wait (default: %(default)s)"
        ),
    ] = 0

    def budget(self, suited: int, max_model_len: int) -> int:
        """Tokens of one iteration, where `suited` would be well for the device."""
        if self.max_num_batched_tokens is not None:
            return self.max_num_batched_tokens
        return max(suited, self.max_num_seqs, 0 if self.enable_chunked_prefill else max_model_len)


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheConfig:
    """The paged KV cache."""

    enable_prefix_caching: Annotated[bool, Flag("reuse the KV blocks of equal beginnings (default: yes)")] = True
    block_size: Annotated[int, Meta(ge=1, le=1024), Flag("tokens in a KV block (default: %(default)s)")] = 16
    num_gpu_blocks_override: Annotated[Positive | None, Flag("KV blocks of an engine (default: what fits)")] = None
    kv_cache_memory_bytes: Annotated[
        Positive | None,
        Flag("memory of an engine's KV cache, such as 2Gi (default: what fits)", parse=num_bytes),
    ] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpConfig:
    """Where the API servers listen, and whom they serve."""

    host: Annotated[str, Flag("address of the public port (default: %(default)s)")] = "127.0.0.1"
    port: Annotated[Port, Flag("public port; 0 takes a free one (default: %(default)s)", metavar="PORT")] = 8000
    api_keys: Annotated[tuple[str, ...], Flag(_KEY_HELP, name="--api-key", metavar="KEY")] = field(
        default=(), repr=False
    )
    allowed_origins: Annotated[
        tuple[str, ...],
        Flag(
            "pages of these origins may use the API in a browser; `*`: all (default: none). These three take words, or"
            " a JSON list as vLLM's do",
            metavar="ORIGIN",
        ),
    ] = ()
    allowed_methods: Annotated[
        tuple[str, ...], Flag("and these methods (default: those of the path)", metavar="METHOD")
    ] = ("*",)
    allowed_headers: Annotated[tuple[str, ...], Flag("and these headers (default: all)", metavar="HEADER")] = ("*",)
    allow_credentials: Annotated[bool, Flag("and cookies; needs origins by name (default: no)")] = False
    admin_host: Annotated[str, Flag("address of the admin ports (default: %(default)s)")] = "127.0.0.1"
    admin_port: Annotated[
        Port,
        Flag(
            "admin port of API server 0, the next ones follow; 0 takes free ones (default: %(default)s)",
            metavar="PORT",
        ),
    ] = 0
    max_connections: Annotated[
        Positive,
        Flag(
            "connections of an API server; for one more, the one that has waited longest for a request is closed, and"
            " where all are at work the answer is 503 (default: %(default)s)"
        ),
    ] = 4096
    head_timeout_s: Annotated[
        float,
        seconds(0.1),
        Flag(
            "how long a connection may take to send a request's head, idle ones too (default: %(default)s)",
            name="--http-head-timeout",
        ),
    ] = 120.0
    body_timeout_s: Annotated[
        float,
        seconds(0.1),
        Flag("and then its body; what takes longer gets a 408 (default: %(default)s)", name="--http-body-timeout"),
    ] = 60.0
    enable_request_id_headers: Annotated[
        bool, Flag("an X-Request-ID in every answer (default: only where the request has one)")
    ] = False
    enable_force_include_usage: Annotated[
        bool, Flag("streams end with their numbers of tokens, asked for or not (default: no)")
    ] = False
    max_num_seqs_per_request: Annotated[
        int, Meta(ge=1, le=2048), Flag("refuse requests for more sequences, prompts times n (default: %(default)s)")
    ] = 2048
    max_num_queued_reqs: Annotated[
        Count | None,
        Flag(
            f"refuse requests beyond so many sequences in the deployment; 0: no limit (default: {QUEUED_REQS} an engine"
            ", and twice its --max-num-seqs at least)"
        ),
    ] = None
    max_num_queued_tokens: Annotated[
        Count | None,
        Flag(
            "refuse requests beyond so many prompt tokens not yet computed; 0: no limit"
            f" (default: {QUEUED_TOKENS} an engine)"
        ),
    ] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatConfig:
    """How chats are read; None and auto: as the model's chat template shows."""

    tool_call_parser: Annotated[
        Literal["hermes", "llama3_json", "mistral"] | None,
        Flag("how the model writes tool calls (default: as its chat template shows)"),
    ] = None
    reasoning_parser: Annotated[
        Literal["auto", "think", "none"],
        Flag("whether <think>…</think> before an answer is told apart (default: as the chat template shows)"),
    ] = "auto"
    trust_control_tokens_in_chats: Annotated[
        bool,
        Flag("let what looks like a control token in a chat's messages be one, as vLLM does (default: it is text)"),
    ] = False


@dataclass(frozen=True, slots=True, kw_only=True)
class StatsConfig:
    """The statistics plane of one deployment, the same in every process."""

    log_stats: Annotated[bool, Flag("keep no counters and histograms, gauges only", name="--disable-log-stats")] = True
    publish_interval_s: Annotated[
        float,
        seconds(0.005),
        Flag("how often an engine broadcasts its snapshot (default: %(default)s)", name="--publish-interval"),
    ] = 0.05
    lease_s: Annotated[
        float, seconds(0.1), Flag("how long a right to export lasts (default: %(default)s)", name="--lease")
    ] = 0.6
    custom_buckets: Annotated[
        Buckets,
        Flag(
            "bounds by family, such as '{\"iteration_tokens\": [1, 64]}'",
            name="--custom-histogram-buckets",
            metavar="JSON",
            parse=buckets,
        ),
    ] = ()
    latency_buckets: Annotated[
        Literal["standard", "fine"], Flag("fine has more bounds below 300 ms (default: %(default)s)")
    ] = "standard"
    metrics_view: Annotated[
        Literal["engines", "pool"],
        Flag(
            "what the public /metrics has of queues and KV caches: each engine's, or with pool one sample for all, for"
            " routers that read one sample a name at a fixed path (default: %(default)s)"
        ),
    ] = "engines"
    otlp_traces_endpoint: Annotated[
        Text | None, Flag("send each request's trace there, OTLP over HTTP", metavar="URL", parse=url)
    ] = None
    otlp_metrics_endpoint: Annotated[
        Text | None, Flag("send gen_ai.server.* histograms there, likewise", metavar="URL", parse=url)
    ] = None
    log_iteration_details: Annotated[
        bool, Flag("log a line for every iteration", name="--enable-logging-iteration-details")
    ] = False

    @property
    def bucket_overrides(self) -> Buckets:
        """Bounds by family that are not the catalogue's."""
        fine = {"latency": FINE_LATENCY} if self.latency_buckets == "fine" else {}
        return tuple((fine | dict(self.custom_buckets)).items())

    @property
    def is_traced(self) -> bool:
        """Whether requests are told to an OTLP endpoint."""
        return self.otlp_traces_endpoint is not None or self.otlp_metrics_endpoint is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long the supervisor waits for what, in seconds."""

    drain_timeout_s: Annotated[
        float,
        seconds(0),
        Flag("how long requests may go on after SIGTERM (default: %(default)s)", name="--drain-timeout"),
    ] = 30.0
    freeze_timeout_s: Annotated[
        float,
        seconds(1),
        Flag("silence after which a process is killed (default: %(default)s)", name="--freeze-timeout"),
    ] = 10.0
    stall_timeout_s: Annotated[
        float,
        seconds(1),
        Flag(
            "busy time without progress after which an engine is killed (default: %(default)s)", name="--stall-timeout"
        ),
    ] = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class DeploymentConfig:
    """All that the operator chose: what the supervisor starts, and how."""

    model: Annotated[ModelConfig, Group("model")]
    num_engines: Annotated[
        NumProcesses,
        Flag(
            "number of engines, each with the whole model (default: %(default)s)",
            name="--data-parallel-size",
            short="-dp",
            group="engine",
        ),
    ] = 1
    scheduler: Annotated[SchedulerConfig, Group("engine")]
    cache: Annotated[CacheConfig, Group("engine")]
    num_api_servers: Annotated[
        NumProcesses,
        Flag(
            "number of API servers (default: as many as engines)",
            name="--api-server-count",
            short="-asc",
            group="API servers",
        ),
    ]
    http: Annotated[HttpConfig, Group("API servers")]
    chat: Annotated[ChatConfig, Group("API servers")]
    stats: Annotated[StatsConfig, Group("statistics")]
    runtime_directory: Annotated[
        Text,
        Flag(
            "where tallies and sockets are (default: in shared memory)",
            name="--runtime-dir",
            metavar="DIR",
            group="supervision",
        ),
    ]
    patience: Annotated[Patience, Group("supervision")]
    engine_module: str = "engine.loop.process"
    api_server_module: str = "frontend.server"
