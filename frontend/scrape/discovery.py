"""The scrape targets of a deployment, for Prometheus' HTTP service discovery. Pure.

Together they have every series of the public port's `/metrics` once, with the same labels, each under an `instance`
that stays the same. It begins with the deployment's public address, so that a Prometheus can have many deployments:

    HOST:PORT/api-server-I   /metrics/own         on its admin port: its own series, none of an engine's
    HOST:PORT/engine-K       /metrics/engine/K    on the public port, from the API server that exports the engine
    HOST:PORT/processes      /metrics/processes   on the public port: the process series of engines and the supervisor

A static target of the public port has `instance="HOST:PORT"`. Whatever stands before the slash is therefore the
deployment for either way to scrape, which a label of its own would not be: static targets would lack it.

So an engine's series keep their identity when the exporter moves, which they would not on the admin ports' `/metrics`
(where they come with whoever exports them). Scrape either these targets or the public port, never both in one sum.

The public address is the one that the question came to: it is known to work from there.
"""

from __future__ import annotations

import re
from typing import Any, Final

from engine.wire import ServerConfig

OWN_PATH: Final = "/metrics/own"
PROCESSES_PATH: Final = "/metrics/processes"
WILDCARDS: Final = ("", "0.0.0.0", "::")
HTTP_PORT: Final = 80
_HOST: Final = re.compile(r"(?P<host>\[[0-9A-Fa-f:.]+\]|[0-9A-Za-z._-]+)(?::(?P<port>[0-9]{1,5}))?")


def targets(config: ServerConfig, asked_host: str) -> list[dict[str, Any]]:
    """Prometheus' list of target groups. `asked_host` is the Host header of the question."""
    public, hostname = _public(config, asked_host)
    groups = [
        _group(f"{hostname if host in WILDCARDS else reachable(host)}:{port}", OWN_PATH, f"{public}/api-server-{index}")
        for index, (host, port) in enumerate(config.admin_addresses)
    ]
    engines = range(config.num_engines)
    groups += [_group(public, f"/metrics/engine/{engine}", f"{public}/engine-{engine}") for engine in engines]
    return [*groups, _group(public, PROCESSES_PATH, f"{public}/processes")]


def _group(address: str, path: str, instance: str) -> dict[str, Any]:
    return {"targets": [address], "labels": {"__metrics_path__": path, "instance": instance}}


def reachable(host: str) -> str:
    """Where to connect for a socket bound to `host`, as it stands in a URL."""
    if host in ("", "0.0.0.0"):
        return "127.0.0.1"
    if host == "::":
        return "[::1]"
    return f"[{host}]" if ":" in host else host


def _public(config: ServerConfig, asked_host: str) -> tuple[str, str]:
    """(HOST:PORT, HOST) as asked; as configured where the Host header is none."""
    match = _HOST.fullmatch(asked_host)
    if match is None:
        return f"{reachable(config.http.host)}:{config.port}", reachable(config.http.host)
    return f"{match['host']}:{match['port'] or HTTP_PORT}", match["host"]
