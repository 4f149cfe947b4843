"""A live deployment in a terminal: engines, API servers, iterations and latencies, from what it exports.

    python -m metrics.top --url http://127.0.0.1:8000

The address is the public one. The figures come from `/metrics/engines` and `/deployment` there, and what is an API
server's own from its admin port where this machine can reach it. Ctrl-C ends it. Figures are worked out in
`metrics.top.figures` and drawn in `metrics.top.view`.

An API server that is stopped or stuck is still `ready` in the deployment's table until the supervisor kills it: that
it takes a connection on its admin port and does not answer is seen here at once.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any, Final

from rich.console import Console
from rich.live import Live

from metrics.audit import parse_samples
from metrics.top.figures import Figures, work_out
from metrics.top.view import WIDE, render
from metrics.top.window import Scrape, Window

TIMEOUT_S: Final = 5.0
ADMIN_TIMEOUT_S: Final = 0.5
MAX_AT_A_TIME: Final = 8  # admin ports asked
HISTORY: Final = 40  # frames
OWN_NAMES: Final = (  # of an API server's admin port
    "wholebatch:api_server_requests_in_flight",
    "http_requests_total",
    "wholebatch:delivered_tokens_total",
)


class Silence(Enum):
    """Stands for an address that takes connections and does not answer."""

    SILENT = auto()


SILENT: Final = Silence.SILENT


class TopError(Exception):
    """There is no deployment to look at; the text says why in one line."""


@dataclass(frozen=True, slots=True)
class Look:
    """Everything that one refresh reads."""

    whole: Scrape
    own: Mapping[int, Scrape]
    silent: Set[int]  # API servers that take a connection and do not answer
    table: Mapping[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """0, or 2: bad use, or nothing to look at."""
    options = _parser().parse_args(argv)
    url = _base(options.url)
    console = Console()
    if not console.is_terminal:
        console = Console(width=max(console.width, WIDE))
    try:
        first = look(url)
        time.sleep(options.interval)
        if options.once:
            console.print(render(figures(first, look(url)), url, width=console.width))
            return 0
        _watch(console, url, first, options)
    except TopError as error:
        print(f"metrics.top: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        pass
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m metrics.top", description="Watch a live deployment.")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="its public address (default: %(default)s)")
    parser.add_argument("--interval", type=_seconds, default=1.0, metavar="S", help="between two looks (default: 1)")
    parser.add_argument("--window", type=_seconds, default=10.0, metavar="S", help="of rates (default: 10)")
    parser.add_argument("--once", action="store_true", help="print one frame, of one interval, and exit")
    return parser


def _seconds(text: str) -> float:
    value = float(text)
    if not 0.05 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"not a number of seconds from 0.05: {text}")
    return value


def _base(url: str) -> str:
    return (url if "://" in url else f"http://{url}").rstrip("/").removesuffix("/metrics")


def _watch(console: Console, url: str, first: Look, options: argparse.Namespace) -> None:
    """Until Ctrl-C. A deployment that cannot be reached for a while is shown as it was, and that it is so."""
    looks = deque([first])
    history: deque[float] = deque(maxlen=HISTORY)
    trouble, failed_at = "", 0.0
    frame = figures(first, first)
    with Live(console=console, screen=console.is_terminal, auto_refresh=False) as live:
        while True:
            try:
                looks.append(look(url))
                trouble = ""
                while len(looks) > 2 and looks[-1].whole.at - looks[1].whole.at >= options.window:
                    looks.popleft()
                frame = figures(looks[0], looks[-1])
                history.append(figures(looks[-2], looks[-1]).generated_per_s or 0.0)
            except TopError as error:
                failed_at = failed_at if trouble else time.monotonic()
                trouble = f"for {time.monotonic() - failed_at:.0f} s: {error}"
            live.update(render(frame, url, width=console.width, trouble=trouble, history=history), refresh=True)
            time.sleep(options.interval)


def figures(earlier: Look, later: Look) -> Figures:
    """What happened between two looks; the same one twice shows the present only."""
    before = None if earlier is later else earlier
    own = {
        index: Window(None if before is None else before.own.get(index), scrape) for index, scrape in later.own.items()
    }
    return work_out(Window(None if before is None else before.whole, later.whole), own, later.table, later.silent)


def look(url: str) -> Look:
    """Read everything once; raises TopError."""
    try:
        table = json.loads(_get(f"{url}/deployment", TIMEOUT_S))
        whole = _scrape(f"{url}/metrics/engines", TIMEOUT_S)
        servers = {row["index"]: row["admin_url"] for row in table["processes"] if "admin_url" in row}
    except urllib.error.HTTPError as error:
        with error:
            said = " ".join(error.read(200).decode(errors="replace").split())
            raise TopError(f"{url} answers {error.code}: {said}") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TopError(f"no wholebatch deployment at {url}: {error}") from error
    own, silent = _own(servers)
    return Look(whole, own, silent, table)


def _own(servers: Mapping[int, str]) -> tuple[dict[int, Scrape], set[int]]:
    """(of those that answer, by index; those that take a connection and do not answer)"""
    with ThreadPoolExecutor(MAX_AT_A_TIME) as pool:
        found = dict(zip(servers, pool.map(_own_scrape, servers.values()), strict=True))
    own = {index: scrape for index, scrape in found.items() if isinstance(scrape, Scrape)}
    return own, {index for index, scrape in found.items() if scrape is SILENT}


def _own_scrape(admin_url: str) -> Scrape | Silence | None:
    """None: it cannot be reached from here, or says something else."""
    try:
        return _scrape(f"{admin_url}/metrics", ADMIN_TIMEOUT_S, OWN_NAMES)
    except TimeoutError:  # while it was connected: a connection that is not made is an URLError
        return SILENT
    except (OSError, ValueError):
        return None


def _scrape(url: str, timeout_s: float, names: tuple[str, ...] = ()) -> Scrape:
    """Of these names only: parsing is what a scrape costs here. Raises OSError, ValueError."""
    at = time.monotonic()
    text = _get(url, timeout_s)
    if names:
        text = "".join(line for line in text.splitlines(keepends=True) if line.startswith(names))
    return Scrape(parse_samples(text), at)


def _get(url: str, timeout_s: float) -> str:
    with urllib.request.urlopen(url, timeout=timeout_s) as answer:
        text: str = answer.read().decode()
    return text
