"""`python -m metrics.dashboards.generate`: writes what the catalogue makes: the README's table, dashboards, rules.

    python -m metrics.dashboards.generate [--check] [README] [GRAFANA]

README is the file whose table stands between two markers, GRAFANA the folder of dashboards, rules and provisioning
files, all of which are written. With --check nothing is written; exit code 1 names the files that would change. Exit
code 2: the README cannot be read or has no markers.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, Final

import yaml

from metrics.catalogue import METRICS, Metric, Scope
from metrics.dashboards import provisioning
from metrics.dashboards.boards import DASHBOARDS
from metrics.dashboards.rules import rule_file

ROOT: Final = Path(__file__).parents[2]
BEGIN: Final = "<!-- metrics:begin -->"
END: Final = "<!-- metrics:end -->"
SUFFIXES: Final = (".json", ".yml", ".yaml")  # of generated files
NOTICE: Final = "# Made by `make generate`; changes here are lost.\n"

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


def grafana_files() -> dict[str, str]:
    """Path below metrics/grafana/ -> text."""
    contents = {**provisioning.files(), provisioning.RULES: rule_file()}
    made = {path: NOTICE + _yaml(content) for path, content in contents.items()}
    return {f"dashboards/{name}": make() for name, make in DASHBOARDS.items()} | made


def _yaml(content: Any) -> str:
    text: str = yaml.safe_dump(content, sort_keys=False, width=1000, allow_unicode=True)
    return text


def changes(readme: Path, grafana: Path) -> dict[Path, str | None]:
    """The files that are not as they should be -> their right text, or None for those that should not be there.
    Raises OSError and MarkersError."""
    old = readme.read_text(encoding="utf-8")
    wanted = {readme: replace_table(old, table())}
    wanted |= {grafana / path: text for path, text in grafana_files().items()}
    different = {path: text for path, text in wanted.items() if _read(path) != text}
    there = {path for path in grafana.rglob("*") if path.suffix in SUFFIXES}
    return {**different, **dict.fromkeys(sorted(there - set(wanted)))}


def _read(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.exists() else None


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m metrics.dashboards.generate", description="Write what the catalogue makes."
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a file would change")
    parser.add_argument("readme", nargs="?", type=Path, default=ROOT / "README.md")
    parser.add_argument("grafana", nargs="?", type=Path, default=ROOT / "metrics" / "grafana")
    options = parser.parse_args(arguments)
    try:
        found = changes(options.readme, options.grafana)
    except (OSError, MarkersError) as error:
        print(f"{options.readme}: {error}", file=sys.stderr)
        return 2
    if options.check:
        for path in found:
            print(f"{path}: not what the catalogue makes; run `make generate`", file=sys.stderr)
        return 1 if found else 0
    for path, text in found.items():
        _put(path, text)
    return 0


def _put(path: Path, text: str | None) -> None:
    if text is None:
        path.unlink()
        print(f"removed {path}")
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    print(f"wrote {path}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
