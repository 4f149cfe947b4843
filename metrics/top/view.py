"""Figures as a picture for a terminal of 80 columns or more, with `rich`. Pure.

From 100 columns on there is one table of engines, and latencies stand beside the iterations. Below, the engines have
two tables and all stands one below the other, what matters most first: a low terminal cuts off the end.

"–" stands for what is not known. Colour repeats what is written, and says nothing alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from metrics.catalogue import PHASES
from metrics.top.figures import QUANTILES, EngineFigures, Figures, LatencyFigures, ProcessFigures, ServerFigures
from metrics.top.window import Bucket

UNKNOWN = "–"
EIGHTHS = " ▏▎▍▌▋▊▉█"
WIDE, LEAST = 100, 80  # columns
LEVELS = "▁▂▃▄▅▆▇█"
GOOD, BAD, DIM, ACCENT = "green", "bold red", "dim", "cyan"
ITERATIONS_TITLE = "iterations by tokens, whole batch"
STATE_STYLES = {"ready": GOOD, "silent": BAD, "ended": BAD, "starting": "yellow", "stopping": "yellow"}


def render(
    figures: Figures, url: str, *, width: int = WIDE, trouble: str = "", history: Sequence[float] = ()
) -> RenderableType:
    """One frame. `trouble` says why it is an old one; `history` is of the generation rate, newest last."""
    if width < LEAST:
        return Text(f"metrics.top needs {LEAST} columns; this terminal has {width}.", BAD)
    top = [_heading(figures, url, trouble, history), _laws(figures.laws)]
    if width < WIDE:
        engines = Group(_engine_states(figures.engines), _engine_pace(figures.engines))
        latency = _panel(_latencies(figures), "latency")
        iterations = _panel(_iterations(_occupied(figures.iteration_buckets)), ITERATIONS_TITLE)
        return Group(*top, _panel(engines, "engines"), latency, _servers(figures.servers), iterations)
    return Group(*top, _engines(figures.engines), _side_by_side(figures), _servers(figures.servers))


def _side_by_side(figures: Figures) -> RenderableType:
    lower = Table.grid(expand=True)
    lower.add_column(ratio=1)
    lower.add_column(width=54)
    rows = _occupied(figures.iteration_buckets)
    height = 2 + max(len(rows), len(figures.latencies) + 1)
    lower.add_row(
        _panel(_iterations(rows), ITERATIONS_TITLE, height),
        _panel(_latencies(figures), "latency", height),
    )
    return lower


# --- numbers ---


def number(value: float | None, digits: int = 3) -> str:
    """With at most so many digits, and a unit of thousands: 0.04, 12.3, 123, 12.3k."""
    if value is None or not math.isfinite(value):
        return UNKNOWN
    for unit in ("", "k", "M", "G"):
        if abs(value) < 999.5 or unit == "G":
            break
        value /= 1000
    if value == 0 or (not unit and value == int(value)):
        return f"{value:.0f}"
    whole_digits = max(1, math.floor(math.log10(abs(value)) + 1e-9) + 1)
    return f"{value:.{max(0, digits - whole_digits)}f}{unit}"


def seconds(value: float | None) -> str:
    """In the unit that suits: 740µs, 23.4ms, 1.20s."""
    if value is None:
        return UNKNOWN
    if value == 0 or value >= 0.9995:
        return f"{number(value)}s"
    return f"{number(value * 1e3)}ms" if value >= 0.9995e-3 else f"{number(value * 1e6)}µs"


def share(value: float | None) -> str:
    """Write a share in percent."""
    return UNKNOWN if value is None else f"{value:.0%}"


def bar(value: float | None, width: int) -> str:
    """A share from 0 to 1, in eighths of a character."""
    eighths = round(min(max(value or 0.0, 0.0), 1.0) * width * 8)
    full, rest = divmod(eighths, 8)
    return ("█" * full + (EIGHTHS[rest] if rest else "")).ljust(width)


def sparkline(values: Sequence[float]) -> str:
    """Draw each value against the greatest."""
    top = max(values, default=0.0)
    return "".join(LEVELS[round(value / top * 7)] if top else LEVELS[0] for value in values)


# --- parts ---


def _heading(figures: Figures, url: str, trouble: str, history: Sequence[float]) -> RenderableType:
    line = Table.grid(expand=True, padding=(0, 1))
    line.add_column(ratio=1, no_wrap=True)
    line.add_column(justify="right", no_wrap=True)
    name = Text.assemble((" wholebatch ", "bold reverse"), " ", (figures.model, "bold"), " ", (url, DIM))
    line.add_row(name, Text("NOT LIVE", BAD) if trouble else Text(f"last {number(figures.window_s)} s", DIM))
    rates = Text.assemble(
        " generated ",
        (f"{number(figures.generated_per_s)}/s", f"bold {ACCENT}"),
        "  delivered ",
        (f"{number(figures.delivered_per_s)}/s", "bold"),
        "  prompts ",
        (f"{number(figures.computed_per_s)}/s", "bold"),
        ("  tokens", DIM),
    )
    line.add_row(rates, Text(sparkline(history), ACCENT))
    finished = " ".join(f"{reason} {number(n)}" for reason, n in (figures.finished or {}).items() if n)
    line.add_row(Text.assemble(" finished ", (finished or UNKNOWN, "bold"), ("  requests", DIM)), "")
    return Group(line, Text(f" {trouble}", BAD, no_wrap=True, overflow="ellipsis")) if trouble else line


def _table(*columns: str, left: Sequence[str] = ()) -> Table:
    table = Table(box=None, expand=True, padding=(0, 1, 0, 0), header_style=DIM, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="left" if column in left else "right", no_wrap=True)
    return table


def _panel(content: RenderableType, title: str, height: int | None = None) -> Panel:
    heading = f"[bold]{title}[/]"
    return Panel(content, title=heading, title_align="left", box=box.ROUNDED, border_style=DIM, height=height)


def _state(process: ProcessFigures) -> Text:
    starts = f" #{process.incarnation}" if process.incarnation > 1 else ""
    return Text(process.state + starts, STATE_STYLES.get(process.state, ""))


def _machine(process: ProcessFigures) -> tuple[str, str]:
    resident = process.resident_bytes
    return share(process.cpu), f"{number(resident / 2**20)}M" if resident is not None else UNKNOWN


STATE_COLUMNS = ("state", "run", "wait", "KV cache", "hits", "preempt", "exporter")
PACE_COLUMNS = ("tok/s", "it/s", "tok/it", "time/it", "pre·dec·mix")
LEFT_COLUMNS = ("state", "KV cache", "exporter")


def _engines(engines: Sequence[EngineFigures]) -> RenderableType:
    table = _table("", *STATE_COLUMNS[:4], *PACE_COLUMNS, *STATE_COLUMNS[4:], left=LEFT_COLUMNS)
    for e in engines:
        state = _state_cells(e)
        table.add_row(str(e.process.index), *state[:4], *_pace_cells(e), *state[4:])
    return _panel(table, "engines")


def _engine_states(engines: Sequence[EngineFigures]) -> RenderableType:
    table = _table("", *STATE_COLUMNS, left=LEFT_COLUMNS)
    for e in engines:
        table.add_row(str(e.process.index), *_state_cells(e))
    return table


def _engine_pace(engines: Sequence[EngineFigures]) -> RenderableType:
    table = _table("", *PACE_COLUMNS)
    for e in engines:
        table.add_row(str(e.process.index), *_pace_cells(e))
    return table


def _state_cells(e: EngineFigures) -> list[RenderableType]:
    """An engine's cells, in the order of STATE_COLUMNS."""
    return [
        _state(e.process),
        number(e.running),
        Text(number(e.waiting), "yellow" if e.waiting else ""),
        Text.assemble((bar(e.kv_usage, 5), _pressure(e.kv_usage)), f" {share(e.kv_usage)}"),
        share(e.cache_hits),
        Text(number(e.preemptions), "yellow" if e.preemptions else ""),
        Text(e.exporter, BAD if e.exporter == "nobody" else ""),
    ]


def _pace_cells(e: EngineFigures) -> list[RenderableType]:
    """An engine's cells, in the order of PACE_COLUMNS."""
    return [
        Text(number(e.generated_per_s), f"bold {ACCENT}"),
        number(e.iterations_per_s),
        Text(number(e.tokens_per_iteration), "bold"),
        seconds(e.seconds_per_iteration),
        UNKNOWN if e.phases is None else "·".join(f"{100 * e.phases[phase]:.0f}" for phase in PHASES),
    ]


def _pressure(usage: float | None) -> str:
    return BAD if usage is not None and usage > 0.95 else "yellow" if usage is not None and usage > 0.8 else GOOD


def _iterations(rows: Sequence[tuple[float, float, float]]) -> RenderableType:
    table = Table.grid(expand=True, padding=(0, 1, 0, 0))
    table.add_column(justify="right", no_wrap=True, style=DIM)
    table.add_column(no_wrap=True, style=ACCENT)
    table.add_column(justify="right", no_wrap=True)
    most = max((count for _, _, count in rows), default=0.0)
    for low, bound, count in rows:
        above = f"> {number(low)}" if math.isinf(bound) else f"≤ {number(bound)}"
        table.add_row(above, bar(count / most, 20), number(count))
    if not rows:
        table.add_row("", Text("none", DIM), "")
    return table


def _occupied(buckets: Sequence[Bucket]) -> list[tuple[float, float, float]]:
    """(lower bound, upper bound, count) from the first bucket that has any to the last."""
    lows = [0.0, *(bound for bound, _ in buckets)]
    rows = [(low, bound, count) for low, (bound, count) in zip(lows, buckets, strict=False)]
    occupied = [place for place, (_, _, count) in enumerate(rows) if count]
    return rows[occupied[0] : occupied[-1] + 1] if occupied else []


def _latencies(figures: Figures) -> RenderableType:
    table = _table("", *(f"p{100 * q:.0f}" for q in QUANTILES), "mean", "count", left=("",))
    for latency in figures.latencies:
        table.add_row(*_latency(latency))
    return table


def _latency(latency: LatencyFigures) -> list[str]:
    def told(value: float | None) -> str:
        is_blind = value is not None and value <= latency.finest
        return f"<{seconds(latency.finest)}" if is_blind else seconds(value)

    return [latency.what, *map(told, latency.quantiles), seconds(latency.mean), number(latency.count)]


def _servers(servers: Sequence[ServerFigures]) -> RenderableType:
    head = ("", "state", "pid", "in flight", "requests/s", "delivered tok/s", "cpu", "memory")
    table = _table(*head, left=("state",))
    for s in servers:
        table.add_row(
            str(s.process.index),
            Text("no answer", BAD) if s.is_silent else _state(s.process),
            str(s.process.pid),
            number(s.in_flight),
            number(s.requests_per_s),
            number(s.delivered_per_s),
            *_machine(s.process),
        )
    return _panel(table, "API servers")


def _laws(laws: Mapping[str, tuple[float, float]]) -> RenderableType:
    if not laws:
        return Text(" audit: not exported", DIM)
    broken = [f"{law} by {number(off)} ({number(times)} times)" for law, (off, times) in laws.items() if off or times]
    if broken:
        return Text(f" audit: VIOLATED {', '.join(broken)}", BAD)
    return Text(f" audit: all {len(laws)} laws hold", GOOD)
