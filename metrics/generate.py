"""`python -m metrics.generate`: writes the README's table of metrics from the catalogue, between its two markers.

    python -m metrics.generate [--check] [README]

With --check nothing is written; exit code 1 says that the table is not the catalogue's. Exit code 2: no such file or
no markers.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Final

from metrics.catalogue import METRICS
from metrics.metric import Metric, Scope

BEGIN: Final = "<!-- metrics:begin -->"
END: Final = "<!-- metrics:end -->"

_SCOPES: Final = {
    Scope.ENGINE: "Counted by each engine, exported by its exporter",
    Scope.REQUEST: "Counted by each API server, summed over them on the public port",
    Scope.PROCESS: "Of every process; with the label `process` on the public port",
    Scope.AUDIT: "Of the supervisor's audit; with the label `process` on the public port",
    Scope.SCRAPE: "Made while a scrape is answered",
}


class MarkersError(ValueError):
    """A text that has no place for the table."""


def table() -> str:
    """The metrics as Markdown, one table a scope."""
    parts = []
    for scope, title in _SCOPES.items():
        rows = "\n".join(_row(metric) for metric in METRICS if metric.scope is scope)
        parts.append(f"**{title}**\n\n| metric | kind | labels | what it is |\n|---|---|---|---|\n{rows}\n")
    return "\n".join(parts)


def _row(metric: Metric) -> str:
    labels = [
        *(["model_name"] if metric.has_model else []),
        *(["engine"] if metric.has_engine else []),
        *(label.name for label in metric.labels),
    ]
    kind = str(metric.kind) + (f" ({metric.buckets})" if metric.buckets else "")
    text = metric.help.replace("|", r"\|")
    return f"| `{metric.name}` | {kind} | {', '.join(labels)} | {text} |"


def replace_table(text: str, made: str) -> str:
    """The text with `made` between its markers; raises MarkersError."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise MarkersError(f"has no {BEGIN} … {END}")
    return f"{before}{BEGIN}\n\n{made}\n{END}{after}"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m metrics.generate", description="Write the README's metric table.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if the table would change")
    parser.add_argument("readme", nargs="?", default=str(Path(__file__).parent.parent / "README.md"))
    options = parser.parse_args(arguments)
    path = Path(options.readme)
    try:
        old = path.read_text(encoding="utf-8")
        new = replace_table(old, table())
    except (OSError, MarkersError) as error:
        print(f"{path}: {error}", file=sys.stderr)
        return 2
    if old == new:
        return 0
    if options.check:
        print(f"{path}: the metric table is not the catalogue's; run `make generate`", file=sys.stderr)
        return 1
    path.write_text(new, encoding="utf-8")
    print(f"wrote the metric table of {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
