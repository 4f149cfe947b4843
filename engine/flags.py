"""The command line of `python -m engine.serve`: flags in, one checked `DeploymentConfig` out.

Flags that vLLM has under the same meaning have vLLM's names. Whatever is wrong with one raises `FlagError`.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit

from engine import default_model
from engine.config import CacheConfig, DeploymentConfig, ModelConfig, SchedulerConfig, StatsConfig
from engine.supervisor import default_runtime_directory
from metrics.catalogue import FINE_LATENCY, parse_overrides

API_KEY_VARIABLE = "WHOLEBATCH_API_KEY"
MAX_PROCESSES = 256
GGUF_MAGIC = b"GGUF"


class FlagError(ValueError):
    """A command line that cannot be served; one line for the operator."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise FlagError(f"{message} (--help lists the flags)")


def _whole(low: int, high: int | None = None) -> Callable[[str], int]:
    def whole(text: str) -> int:
        number = int(text)
        if number < low or (high is not None and number > high):
            raise ValueError
        return number

    whole.__name__ = f"whole number from {low}" + ("" if high is None else f" to {high}")
    return whole


def _seconds(low: float) -> Callable[[str], float]:
    def seconds(text: str) -> float:
        number = float(text)
        if not (math.isfinite(number) and number >= low):
            raise ValueError
        return number

    seconds.__name__ = f"number of seconds from {low:g}"
    return seconds


def _name(text: str) -> str:
    if not text or not text.isprintable():  # what is no UTF-8 is not printable either
        raise ValueError
    return text


_name.__name__ = "printable name"


def _bytes(text: str) -> int:
    """A number of bytes, or of K, M, G (1000) or Ki, Mi, Gi (1024)."""
    powers = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "K": 10**3, "M": 10**6, "G": 10**9}
    suffix = next((s for s in powers if text.endswith(s)), "")
    number = float(text.removesuffix(suffix)) * powers.get(suffix, 1)
    if not (math.isfinite(number) and number >= 1):
        raise ValueError
    return int(number)


_bytes.__name__ = "number of bytes"


def _url(text: str) -> str:
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0:
        raise ValueError
    return text


_url.__name__ = "http:// or https:// URL"


def make_parser() -> argparse.ArgumentParser:
    """Every flag, with its help."""
    parser = _Parser(
        prog="python -m engine.serve",
        usage="python -m engine.serve [flags]",
        description="Serve a model over the OpenAI API: one supervisor, some engines, some API servers.",
        allow_abbrev=False,
    )
    _add_model_flags(parser.add_argument_group("model"))
    _add_engine_flags(parser.add_argument_group("engine"))
    _add_server_flags(parser.add_argument_group("API servers"))
    _add_statistics_flags(parser.add_argument_group("statistics"))
    _add_supervision_flags(parser.add_argument_group("supervision"))
    return parser


def _add_model_flags(group: Any) -> None:
    add = group.add_argument
    add("--model", help=f"a Hugging Face directory or a .gguf file (default: {default_model.NAME}, fetched once)")
    add(
        "--served-model-name",
        type=_name,
        nargs="+",
        metavar="NAME",
        help="what clients call it; the first one labels metrics (default: the file's or directory's name)",
    )
    add(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="of weights and KV cache (default: as fits model and device)",
    )
    add(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="what computes (default: a GPU where there is one)",
    )
    add(
        "--quantization",
        choices=("int8",),
        help="hold and multiply the matrices as int8, on a CPU: faster, a little less exact (default: no)",
    )
    add("--max-model-len", type=_whole(1), metavar="N", help="longest context, in tokens (default: the model's)")
    add(
        "--seed",
        type=_whole(0),
        metavar="N",
        help="fixes what requests without a seed draw, for each engine's each start (default: at random)",
    )


def _add_engine_flags(group: Any) -> None:
    add, switch = group.add_argument, argparse.BooleanOptionalAction
    add(
        "--data-parallel-size",
        "-dp",
        type=_whole(1, MAX_PROCESSES),
        default=1,
        metavar="N",
        help="number of engines, each with the whole model (default: 1)",
    )
    add("--max-num-seqs", type=_whole(1), default=256, metavar="N", help="sequences in a batch (default: %(default)s)")
    add(
        "--max-num-batched-tokens",
        type=_whole(1),
        metavar="N",
        help="tokens computed in one iteration (default: 512 on a CPU, 2048 on a GPU)",
    )
    add("--enable-chunked-prefill", action=switch, default=True, help="compute long prompts in parts (default: yes)")
    add(
        "--long-prefill-token-threshold",
        type=_whole(0),
        default=0,
        metavar="N",
        help="longest part of a prompt in one iteration; 0: only the budget limits it, and on a CPU, while others"
        " decode, how long these would wait (default: %(default)s)",
    )
    add(
        "--enable-prefix-caching",
        action=switch,
        default=True,
        help="reuse the KV blocks of equal beginnings (default: yes)",
    )
    add(
        "--block-size",
        type=_whole(1, 1024),
        default=16,
        metavar="N",
        help="tokens in a KV block (default: %(default)s)",
    )
    add("--num-gpu-blocks-override", type=_whole(1), metavar="N", help="KV blocks of an engine (default: what fits)")
    add(
        "--kv-cache-memory-bytes",
        type=_bytes,
        metavar="N",
        help="memory of an engine's KV cache, such as 2Gi (default: what fits)",
    )


def _add_server_flags(group: Any) -> None:
    add = group.add_argument
    add("--host", default="127.0.0.1", help="address of the public port (default: %(default)s)")
    add(
        "--port",
        type=_whole(0, 65535),
        default=8000,
        metavar="PORT",
        help="public port; 0 takes a free one (default: %(default)s)",
    )
    add(
        "--api-server-count",
        "-asc",
        type=_whole(1, MAX_PROCESSES),
        metavar="N",
        help="number of API servers (default: as many as engines)",
    )
    add(
        "--api-key",
        nargs="+",
        default=[],
        metavar="KEY",
        help=f"what clients must present; seen in `ps` at the start, better set {API_KEY_VARIABLE}",
    )
    add("--admin-host", default="127.0.0.1", help="address of the admin ports (default: %(default)s)")
    add(
        "--admin-port",
        type=_whole(0, 65535),
        default=0,
        metavar="PORT",
        help="admin port of API server 0, the next ones follow; 0 takes free ones (default: %(default)s)",
    )
    for what, unit in (("reqs", "sequences in the deployment"), ("tokens", "prompt tokens not yet computed")):
        add(f"--max-num-queued-{what}", type=_whole(1), metavar="N", help=f"refuse requests beyond so many {unit}")


def _add_statistics_flags(group: Any) -> None:
    add = group.add_argument
    add("--disable-log-stats", action="store_true", help="keep no counters and histograms, gauges only")
    add(
        "--publish-interval",
        type=_seconds(0.005),
        default=0.05,
        metavar="S",
        help="how often an engine broadcasts its snapshot (default: %(default)s)",
    )
    add(
        "--lease",
        type=_seconds(0.1),
        default=0.6,
        metavar="S",
        help="how long a right to export lasts (default: %(default)s)",
    )
    add(
        "--custom-histogram-buckets", metavar="JSON", help="bounds by family, such as '{\"iteration_tokens\": [1, 64]}'"
    )
    add(
        "--latency-buckets",
        choices=("standard", "fine"),
        default="standard",
        help="fine has more bounds below 300 ms (default: %(default)s)",
    )
    add("--otlp-traces-endpoint", type=_url, metavar="URL", help="send each request's trace there, OTLP over HTTP")
    add("--otlp-metrics-endpoint", type=_url, metavar="URL", help="send gen_ai.server.* histograms there, likewise")
    add("--enable-logging-iteration-details", action="store_true", help="log a line for every iteration")


def _add_supervision_flags(group: Any) -> None:
    add = group.add_argument
    add("--runtime-dir", type=Path, metavar="DIR", help="where tallies and sockets are (default: in shared memory)")
    add(
        "--drain-timeout",
        type=_seconds(0),
        default=30.0,
        metavar="S",
        help="how long requests may go on after SIGTERM (default: %(default)s)",
    )
    add(
        "--freeze-timeout",
        type=_seconds(1),
        default=10.0,
        metavar="S",
        help="silence after which a process is killed (default: %(default)s)",
    )
    add(
        "--stall-timeout",
        type=_seconds(1),
        default=60.0,
        metavar="S",
        help="busy time without progress after which an engine is killed (default: %(default)s)",
    )


def parse(arguments: list[str], environment: dict[str, str]) -> DeploymentConfig:
    """Raises FlagError; fetches the default model when no other is named."""
    flags = make_parser().parse_args(arguments)
    if flags.max_num_batched_tokens and flags.max_num_batched_tokens < flags.max_num_seqs:
        raise FlagError(
            f"--max-num-batched-tokens {flags.max_num_batched_tokens} is less than --max-num-seqs {flags.max_num_seqs}:"
            " an iteration must have room for one token of every sequence"
        )
    num_api_servers = flags.api_server_count or flags.data_parallel_size
    if flags.admin_port and flags.admin_port + num_api_servers > 65536:
        raise FlagError(f"--admin-port {flags.admin_port} and the {num_api_servers - 1} after it go beyond 65535")
    if (flags.otlp_traces_endpoint or flags.otlp_metrics_endpoint) and not _has_otlp():
        raise FlagError("--otlp-traces-endpoint and --otlp-metrics-endpoint need: pip install 'wholebatch[otel]'")
    if flags.quantization and (flags.device == "cuda" or flags.dtype not in ("auto", "float32")):
        raise FlagError(f"--quantization {flags.quantization} is for a CPU and float32 alone")
    path, name = _model(flags.model)
    if not flags.served_model_name and not (name and name.isprintable()):
        raise FlagError(f"--model {flags.model!r}: not a name for clients, give one with --served-model-name")
    if "" in flags.api_key:
        raise FlagError("--api-key: an empty key lets everybody in")
    keys = [*flags.api_key, *filter(None, [environment.get(API_KEY_VARIABLE)])]
    return DeploymentConfig(
        num_engines=flags.data_parallel_size,
        num_api_servers=num_api_servers,
        host=flags.host,
        port=flags.port,
        admin_host=flags.admin_host,
        admin_port=flags.admin_port,
        served_model_names=tuple(flags.served_model_name or [name]),
        api_keys=tuple(keys),
        runtime_directory=str((flags.runtime_dir or default_runtime_directory()).absolute()),
        drain_timeout_s=flags.drain_timeout,
        max_num_queued_reqs=flags.max_num_queued_reqs,
        max_num_queued_tokens=flags.max_num_queued_tokens,
        otlp_traces_endpoint=flags.otlp_traces_endpoint,
        otlp_metrics_endpoint=flags.otlp_metrics_endpoint,
        freeze_timeout_s=flags.freeze_timeout,
        model=ModelConfig(
            path=str(path),
            dtype=flags.dtype,
            quantization=flags.quantization,
            max_model_len=flags.max_model_len,
            seed=flags.seed,
            device=flags.device,
        ),
        cache=CacheConfig(
            block_size=flags.block_size,
            num_gpu_blocks_override=flags.num_gpu_blocks_override,
            kv_cache_memory_bytes=flags.kv_cache_memory_bytes,
            enable_prefix_caching=flags.enable_prefix_caching,
        ),
        scheduler=SchedulerConfig(
            max_num_seqs=flags.max_num_seqs,
            max_num_batched_tokens=flags.max_num_batched_tokens,
            enable_chunked_prefill=flags.enable_chunked_prefill,
            long_prefill_token_threshold=flags.long_prefill_token_threshold,
        ),
        stats=_stats(flags),
    )


def _stats(flags: argparse.Namespace) -> StatsConfig:
    if flags.publish_interval * 4 > flags.lease:
        raise FlagError(f"--lease {flags.lease:g} is less than four publish intervals of {flags.publish_interval:g}")
    overrides: dict[str, tuple[float, ...]] = {}
    if flags.latency_buckets == "fine":
        overrides["latency"] = FINE_LATENCY
    if flags.custom_histogram_buckets is not None:
        try:
            overrides |= dict(parse_overrides(flags.custom_histogram_buckets))
        except ValueError as error:
            raise FlagError(f"--custom-histogram-buckets: {error}") from error
    return StatsConfig(
        log_stats=not flags.disable_log_stats,
        publish_interval_s=flags.publish_interval,
        lease_s=flags.lease,
        bucket_overrides=tuple(overrides.items()),
        log_iteration_details=flags.enable_logging_iteration_details,
        stall_timeout_s=flags.stall_timeout,
    )


def _has_otlp() -> bool:
    try:
        return importlib.util.find_spec("opentelemetry.exporter.otlp.proto.http") is not None
    except ModuleNotFoundError:
        return False


def _model(named: str | None) -> tuple[Path, str]:
    """(path, name), as far as it can be checked without reading the weights."""
    if named is None:
        try:
            return default_model.fetch(), default_model.NAME
        except default_model.FetchError as error:
            raise FlagError(str(error)) from error
    path = Path(named).absolute()
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise FlagError(f"--model {named!r}: a path that is not UTF-8") from error
    try:
        if path.is_dir():
            if not (path / "config.json").is_file():
                raise FlagError(f"--model {named}: no config.json in this directory")
        elif path.is_file():
            with path.open("rb") as file:
                if file.read(4) != GGUF_MAGIC:
                    raise FlagError(f"--model {named}: not a GGUF file")
        else:
            raise FlagError(f"--model {named}: no such file or directory (models are not downloaded)")
    except OSError as error:
        raise FlagError(f"--model {named}: {error.strerror or error}") from error
    return path, path.name
