"""`python -m tests.readme [--check]`: writes into the pages what the code says: maps, flags, metrics, benchmarks.

Each made part stands between two markers, `<!-- NAME:begin -->` and `<!-- NAME:end -->`; the rest of a page is written
by hand. With --check nothing is written; exit code 1 names the pages that differ.

A map is made from docstrings. A wing (a folder with modules) has one sentence there, and says on which street it lies:
`Street: work.`, `truth`, `both` or `neither`.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Final

from engine.flags import make_parser
from metrics.catalogue import METRICS, Metric, Scope
from tests.benchmarks.__main__ import NOT_BENCHMARKS

ROOT: Final = Path(__file__).parent.parent
PACKAGES: Final = ("engine", "frontend", "metrics")
STREETS: Final = {
    "both": "On both streets",
    "work": "On the work street",
    "truth": "On the truth street",
    "neither": "Beside the streets",
}
SCOPES: Final = {
    Scope.ENGINE: "Counted by each engine, exported by its exporter",
    Scope.REQUEST: "Counted by each API server, summed over them on the public port",
    Scope.PROCESS: "Of every process; with the label `process` on the public port",
    Scope.AUDIT: "Of the supervisor's audit; with the label `process` on the public port",
    Scope.HOOK: "Of our part inside vLLM; with the label `process`",
    Scope.SCRAPE: "Made while a scrape is answered",
}


class PageError(ValueError):
    """A page without a place for what is made, or a wing that does not say where it lies."""


# --- docstrings ---


def docstring(path: Path) -> str:
    """A module's docstring; raises PageError where it has none."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    if not text:
        raise PageError(f"{path} has no docstring")
    return text


def summary(path: Path) -> str:
    """The first paragraph of a module's docstring."""
    return docstring(path).partition("\n\n")[0]


def street(wing: Path) -> str:
    """The street that a wing's docstring names; raises PageError."""
    found = re.search(r"^Street: (\w+)", docstring(wing / "__init__.py"), re.MULTILINE)
    if found is None or found[1] not in STREETS:
        raise PageError(f"{wing}/__init__.py does not say `Street:` and one of {', '.join(STREETS)}")
    return found[1]


def wings(package: Path) -> list[Path]:
    """Every folder of a package that has modules, in order; the package itself is none."""
    return sorted(init.parent for init in package.rglob("__init__.py") if init.parent != package)


def rooms(folder: Path) -> list[Path]:
    """The modules of one folder, without those of the folders in it."""
    return [path for path in sorted(folder.glob("*.py")) if path.name not in ("__init__.py", "__main__.py")]


# --- parts of pages ---


def map_of_wings(root: Path) -> str:
    """Every package and each of its wings with its street and its sentence, one table; wings in wings are left out."""
    rows = []
    for package in (root / name for name in PACKAGES):
        rows.append((f"[`{package.name}/`]({package.name}/README.md)", "", summary(package / "__init__.py")))
        outer = [wing for wing in wings(package) if wing.parent == package]
        rows += [(_code(wing, root), street(wing), summary(wing / "__init__.py")) for wing in outer]
    return _table(("wing", "street", "what it is"), rows)


def map_of_modules(package: Path) -> str:
    """Every module of a package with its sentence: those of no wing, then wing by wing, street by street."""
    parts = [_modules(package, package)]
    by_street = {name: [wing for wing in wings(package) if street(wing) == name] for name in STREETS}
    for name, there in by_street.items():
        if there:
            parts.append(f"### {STREETS[name]}")
        for wing in there:
            sentence = _words(summary(wing / "__init__.py"))
            parts.append(f"{_code(wing, package.parent)}: {sentence}\n\n{_modules(wing, package)}")
    return "\n\n".join(parts)


def _modules(folder: Path, package: Path) -> str:
    return _table(("module", "what it is"), [(_code(path, package), summary(path)) for path in rooms(folder)])


def list_of_flags() -> str:
    """Every flag with its help, one table."""
    formatter = argparse.HelpFormatter("")
    rows = []
    for group in make_parser()._action_groups:
        for action in group._group_actions:
            if action.option_strings and action.dest != "help":
                names = ", ".join(f"`{name}`" for name in action.option_strings)
                rows.append((names, formatter._expand_help(action)))
    return _table(("flag", "what it does"), rows)


def list_of_metrics() -> str:
    """Every metric of the catalogue, one table a scope."""
    parts = []
    for scope, title in SCOPES.items():
        rows = [_metric(metric) for metric in METRICS if metric.scope is scope]
        parts.append(f"**{title}**\n\n{_table(('metric', 'kind', 'labels', 'what it is'), rows)}")
    return "\n\n".join(parts)


def _metric(metric: Metric) -> tuple[str, ...]:
    labels = [
        *(["model_name"] if metric.has_model else []),
        *(["engine"] if metric.has_engine else []),
        *(label.name for label in metric.labels),
    ]
    kind = str(metric.kind) + (f" ({metric.buckets})" if metric.buckets else "")
    return f"`{metric.name}`", kind, ", ".join(labels), metric.help


def list_of_benchmarks(folder: Path) -> str:
    """Every benchmark that `make bench` knows, with its sentence."""
    paths = [path for path in rooms(folder) if path.stem not in NOT_BENCHMARKS]
    return _table(("name", "what it measures"), [(f"`{path.stem}`", summary(path)) for path in paths])


def _table(heads: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [_row(heads), "|" + "---|" * len(heads)]
    lines += [_row(_words(cell).replace("|", r"\|") for cell in row) for row in rows]
    return "\n".join(lines)


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _words(text: str) -> str:
    return " ".join(text.split())


def _code(path: Path, below: Path) -> str:
    name = path.relative_to(below).as_posix()
    return f"`{name}`" if path.suffix else f"`{name}/`"


# --- pages ---


Makers = Mapping[str, Callable[[], str]]  # name of the markers → what makes the text between them


def pages(root: Path) -> dict[Path, Makers]:
    """Every page that has made parts."""
    benchmarks = root / "tests" / "benchmarks"
    maps: dict[str, Callable[[], str]] = {name: partial(map_of_modules, root / name) for name in PACKAGES}
    return {
        root / "README.md": {"map": partial(map_of_wings, root)},
        root / "engine" / "README.md": {"map": maps["engine"], "flags": list_of_flags},
        root / "frontend" / "README.md": {"map": maps["frontend"]},
        root / "metrics" / "README.md": {"map": maps["metrics"], "metrics": list_of_metrics},
        benchmarks / "README.md": {"benchmarks": partial(list_of_benchmarks, benchmarks)},
    }


def put(page: Path, text: str, name: str, made: str) -> str:
    """The page's text with `made` between the markers of that name; raises PageError."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, found_begin, rest = text.partition(begin)
    _, found_end, after = rest.partition(end)
    if not found_begin or not found_end:
        raise PageError(f"{page} has no {begin} … {end}")
    return f"{before}{begin}\n\n{made}\n\n{end}{after}"


def changes(made: Mapping[Path, Makers]) -> dict[Path, str]:
    """The pages that are not as the code says -> their right text; raises OSError and PageError."""
    found = {}
    for page, makers in made.items():
        old = new = page.read_text(encoding="utf-8")
        for name, make in makers.items():
            new = put(page, new, name, make())
        if new != old:
            found[page] = new
    return found


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a page would change")
    is_check = parser.parse_args(arguments).check
    try:
        found = changes(pages(ROOT))
    except (OSError, PageError) as error:
        print(error, file=sys.stderr)
        return 2
    for page, text in found.items():
        if is_check:
            print(f"{page}: not what the code says; run `make generate`", file=sys.stderr)
        else:
            page.write_text(text, encoding="utf-8")
            print(f"wrote {page}")
    return int(is_check and bool(found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
