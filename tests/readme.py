"""`python -m tests.readme [--check]`: writes the README's map of modules and its list of flags from the code.

The metric table is `metrics.dashboards.generate`'s. With --check nothing is written; exit code 1 says that the README
differs.
"""

from __future__ import annotations

import argparse
import ast
import sys
from pathlib import Path

from engine.flags import make_parser

ROOT = Path(__file__).parent.parent


def map_of_modules() -> str:
    """Every module with the first sentence of its docstring, one table a package."""
    tables = []
    for package in ("engine", "frontend", "metrics"):
        rows = []
        for path in sorted((ROOT / package).rglob("*.py")):
            if path.name not in ("__init__.py", "__main__.py"):
                text = (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n\n")[0]
                rows.append(f"| `{path.relative_to(ROOT)}` | {_cell(text)} |")
        tables.append("| module | what it is |\n|---|---|\n" + "\n".join(rows))
    return "\n\n".join(tables)


def list_of_flags() -> str:
    """Every flag with its help, one table."""
    formatter = argparse.HelpFormatter("")
    rows = []
    for group in make_parser()._action_groups:
        for action in group._group_actions:
            if action.option_strings and action.dest != "help":
                names = ", ".join(f"`{name}`" for name in action.option_strings)
                rows.append(f"| {names} | {_cell(formatter._expand_help(action))} |")
    return "| flag | what it does |\n|---|---|\n" + "\n".join(rows)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def put(text: str, name: str, made: str) -> str:
    """The text with `made` between the markers of that name."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, found_begin, rest = text.partition(begin)
    _, found_end, after = rest.partition(end)
    if not found_begin or not found_end:
        raise SystemExit(f"README.md has no {begin} … {end}")
    return f"{before}{begin}\n\n{made}\n\n{end}{after}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if the README would change")
    is_check = parser.parse_args().check
    readme = ROOT / "README.md"
    old = readme.read_text()
    new = put(put(old, "map", map_of_modules()), "flags", list_of_flags())
    if new == old:
        return 0
    if is_check:
        print("README.md: its map or its flags are not the code's; run `make generate`", file=sys.stderr)
        return 1
    readme.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
