"""What one API server process is told at its start, by the supervisor. Pure.

The JSON comes through an inherited descriptor, so that API keys are never an argument or an environment variable. It
is input from another process: whatever is not what the supervisor writes raises `ConfigError`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from typing import Any

from metrics.layout import Shape


class ConfigError(ValueError):
    """A start configuration that cannot be used; the text names what is wrong."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """One API server. The descriptors are its own: it closes them."""

    index: int
    incarnation: int
    directory: str  # the deployment's
    num_engines: int
    num_api_servers: int
    listen_fd: int  # the public socket, listening already, shared by all API servers
    admin_fd: int  # this API server's own listening socket
    lifeline_fd: int
    admin_addresses: tuple[tuple[str, int], ...]  # of every API server, by index
    host: str
    port: int
    model_path: str  # for the tokenizer and the chat template
    served_model_names: tuple[str, ...]
    api_keys: tuple[str, ...]
    lease_s: float
    publish_interval_s: float
    log_stats: bool
    bucket_overrides: tuple[tuple[str, tuple[float, ...]], ...]
    max_model_len: int | None  # None: as the engine finds it
    drain_timeout_s: float
    max_num_queued_reqs: int | None = None  # None: no limit
    max_num_queued_tokens: int | None = None
    otlp_traces_endpoint: str | None = None  # URLs; None: no traces, no OTLP metrics
    otlp_metrics_endpoint: str | None = None

    @property
    def is_traced(self) -> bool:
        """Whether requests are told to an OTLP endpoint."""
        return self.otlp_traces_endpoint is not None or self.otlp_metrics_endpoint is not None

    def shape(self, max_model_len: int) -> Shape:
        """What the layouts of this deployment's tallies depend on."""
        return Shape(
            num_engines=self.num_engines,
            num_api_servers=self.num_api_servers,
            max_model_len=max_model_len,
            bucket_overrides=self.bucket_overrides,
        )


_WHOLE = ("index", "incarnation", "num_engines", "num_api_servers", "listen_fd", "admin_fd", "lifeline_fd", "port")
_TEXT = ("directory", "host", "model_path")
_LIMITS = ("max_num_queued_reqs", "max_num_queued_tokens")  # may be left out
_ENDPOINTS = ("otlp_traces_endpoint", "otlp_metrics_endpoint")  # may be left out
_SECONDS = ("lease_s", "publish_interval_s", "drain_timeout_s")


def server_config_from_json(text: str) -> ServerConfig:
    """Raises ConfigError."""
    try:
        raw: Any = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"no JSON: {error}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"no JSON object: {str(raw)[:80]!r}")
    raw = dict.fromkeys((*_LIMITS, *_ENDPOINTS)) | raw
    if wrong := set(raw) ^ {field.name for field in fields(ServerConfig)}:
        raise ConfigError(f"fields missing or unknown: {sorted(wrong)}")
    _check_plain(raw)
    try:
        raw["admin_addresses"] = tuple((str(host), int(port)) for host, port in raw["admin_addresses"])
        raw["served_model_names"] = tuple(str(name) for name in raw["served_model_names"])
        raw["api_keys"] = tuple(str(key) for key in raw["api_keys"])
        overrides = ((str(family), tuple(float(b) for b in bounds)) for family, bounds in raw["bucket_overrides"])
        raw["bucket_overrides"] = tuple(overrides)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"a list is not what it should be: {error}") from error
    if len(raw["admin_addresses"]) != raw["num_api_servers"] or not raw["served_model_names"]:
        raise ConfigError("admin_addresses is not one per API server, or served_model_names is empty")
    return ServerConfig(**raw)


def reachable(host: str) -> str:
    """Where to connect for a socket bound to `host`, as it stands in a URL."""
    if host in ("", "0.0.0.0"):
        return "127.0.0.1"
    if host == "::":
        return "[::1]"
    return f"[{host}]" if ":" in host else host


def _check_plain(raw: dict[str, Any]) -> None:
    checks = (
        (_WHOLE, lambda v: type(v) is int and v >= 0, "a whole number from 0"),
        (_TEXT, lambda v: type(v) is str and v, "text"),
        (_SECONDS, lambda v: type(v) in (int, float) and v >= 0, "seconds"),
        (("log_stats",), lambda v: type(v) is bool, "a boolean"),
        (_ENDPOINTS, lambda v: v is None or (type(v) is str and v), "a URL or null"),
        (
            ("max_model_len", *_LIMITS),
            lambda v: v is None or (type(v) is int and v > 0),
            "a whole number from 1 or null",
        ),
    )
    for names, is_right, what in checks:
        for name in names:
            if not is_right(raw[name]):
                raise ConfigError(f"{name} is not {what}: {str(raw[name])[:80]!r}")
