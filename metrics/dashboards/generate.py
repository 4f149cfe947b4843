"""`python -m metrics.dashboards.generate`: writes what the catalogue makes for Grafana and Prometheus.

    python -m metrics.dashboards.generate [--check] [GRAFANA]

GRAFANA is the folder of dashboards, rules and provisioning files, all of which are written. With --check nothing is
written; exit code 1 names the files that would change.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, Final

import yaml

from metrics.dashboards import provisioning
from metrics.dashboards.boards import DASHBOARDS
from metrics.dashboards.rules import rule_file

ROOT: Final = Path(__file__).parents[2]
SUFFIXES: Final = (".json", ".yml", ".yaml")  # of generated files
NOTICE: Final = "# Made by `make generate`; changes here are lost.\n"


def grafana_files() -> dict[str, str]:
    """Path below metrics/grafana/ -> text."""
    contents = {**provisioning.files(), provisioning.RULES: rule_file()}
    made = {path: NOTICE + _yaml(content) for path, content in contents.items()}
    return {f"dashboards/{name}": make() for name, make in DASHBOARDS.items()} | made


def _yaml(content: Any) -> str:
    text: str = yaml.safe_dump(content, sort_keys=False, width=1000, allow_unicode=True)
    return text


def changes(grafana: Path) -> dict[Path, str | None]:
    """The files that are not as they should be -> their right text, or None for those that should not be there."""
    wanted = {grafana / path: text for path, text in grafana_files().items()}
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
    parser.add_argument("grafana", nargs="?", type=Path, default=ROOT / "metrics" / "grafana")
    options = parser.parse_args(arguments)
    found = changes(options.grafana)
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
