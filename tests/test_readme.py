"""The pages: what is made is what the code says, and what they name is there."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from metrics.catalogue import METRICS
from tests.readme import ROOT, PageError, changes, list_of_metrics, main, map_of_modules, map_of_wings, pages, put

PAGES = tuple(pages(ROOT))
PAGE = "# Title\n\n<!-- map:begin -->\nold\n<!-- map:end -->\n\nrest\n"


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


# --- what is made ---


def test_the_pages_that_are_checked_in_are_what_the_code_says():
    assert [name_of(page) for page in changes(pages(ROOT))] == []
    assert main(["--check"]) == 0


def test_only_what_is_between_the_markers_changes(tmp_path: Path):
    page = tmp_path / "README.md"
    page.write_text(PAGE)
    (text,) = changes({page: {"map": lambda: "made"}}).values()
    assert text == "# Title\n\n<!-- map:begin -->\n\nmade\n\n<!-- map:end -->\n\nrest\n"
    assert page.read_text() == PAGE
    page.write_text(text)
    assert changes({page: {"map": lambda: "made"}}) == {}


@pytest.mark.parametrize("text", ["", "<!-- map:begin -->", "<!-- map:end -->", "<!-- map:end --><!-- map:begin -->"])
def test_a_page_without_both_markers_is_an_error_that_names_it(text: str):
    with pytest.raises(PageError, match=r"README\.md has no <!-- map:begin -->"):
        put(Path("README.md"), text, "map", "made")


def package(folder: Path, docstring_of_wing: str) -> Path:
    """A package of one module beside its wings, and one wing of one module."""
    texts = {"": "All.", "flat": "Flat | one.\n\nMore.", "wing": docstring_of_wing, "wing/room": "A room."}
    for name, text in texts.items():
        path = folder / "engine" / (f"{name}/__init__.py" if name in ("", "wing") else f"{name}.py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'"""{text}\n"""\n')
    return folder / "engine"


def test_a_map_has_every_module_under_its_wing_and_street(tmp_path: Path):
    made = map_of_modules(package(tmp_path, "A wing.\n\nStreet: truth, its end."))
    assert re.findall(r"^(?:###|`|\| `).*", made, re.MULTILINE) == [
        r"| `flat.py` | Flat \| one. |",
        "### On the truth street",
        "`engine/wing/`: A wing.",
        "| `wing/room.py` | A room. |",
    ]


@pytest.mark.parametrize("docstring", ["A wing.", "A wing.\n\nStreet: high."])
def test_a_wing_that_names_no_street_is_an_error(tmp_path: Path, docstring: str):
    with pytest.raises(PageError, match=r"wing/__init__\.py does not say"):
        map_of_modules(package(tmp_path, docstring))


def test_the_readme_maps_wings_in_one_line_each():
    rows = [line for line in map_of_wings(ROOT).splitlines() if "/`" in line]
    assert sum("README.md" in row for row in rows) == 3
    assert any(row.startswith("| `engine/loop/` | both | ") for row in rows)


def test_the_table_of_metrics_has_every_metric_once():
    rows = [line for line in list_of_metrics().splitlines() if line.startswith("| `")]
    assert sorted(row.split("`")[1] for row in rows) == sorted(metric.name for metric in METRICS)
    assert all(row.count(" | ") == 3 for row in rows)


# --- what is named ---


def anchors(page: Path) -> set[str]:
    """The headings of a page as GitHub links to them."""
    heads = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_link_leads_somewhere(page: Path):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), target
        assert not anchor or anchor in anchors(there), target


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_command_and_every_file_that_is_named_is_there(page: Path):
    text = page.read_text()
    for module in re.findall(r"python -m ([a-z_.]*[a-z_])", text):
        assert importlib.util.find_spec(module), module
    verbs = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"`make ([a-z-]+)", text)) <= verbs
    named = set(re.findall(r"`((?:engine|frontend|metrics|tests|loop|schedule|supervisor|files)/[\w./-]*)`", text))
    assert [path for path in named if not (ROOT / path).exists() and not (page.parent / path).exists()] == []


def test_the_statistics_plane_can_be_used_as_its_page_says():
    example = re.search(r"## Using it alone.*?```python\n(.*?)```", (ROOT / "metrics/README.md").read_text(), re.DOTALL)
    assert example is not None
    done = subprocess.run([sys.executable, "-c", example[1]], capture_output=True, text=True, cwd=ROOT, check=True)
    assert 'vllm:iteration_tokens_total_sum{engine="0",model_name="my-model"} 129' in done.stdout
