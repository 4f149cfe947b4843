"""The README's metric table."""

from __future__ import annotations

from pathlib import Path

import pytest

from metrics.catalogue import METRICS
from metrics.generate import BEGIN, END, main, replace_table, table

README = f"# Title\n\n{BEGIN}\nold\n{END}\n\nrest\n"


def test_the_table_has_every_metric_once():
    rows = [line for line in table().splitlines() if line.startswith("| `")]
    assert sorted(row.split("`")[1] for row in rows) == sorted(metric.name for metric in METRICS)
    assert all(row.count(" | ") == 3 for row in rows)


def test_only_what_is_between_the_markers_changes(tmp_path: Path):
    readme = tmp_path / "README.md"
    readme.write_text(README)
    assert main(["--check", str(readme)]) == 1
    assert readme.read_text() == README
    assert main([str(readme)]) == 0
    written = readme.read_text()
    assert table() in written
    assert written.startswith("# Title\n\n")
    assert written.endswith(f"{END}\n\nrest\n")
    assert replace_table(written, table()) == written
    assert main(["--check", str(readme)]) == 0


@pytest.mark.parametrize("text", ["", BEGIN, END, f"{END}{BEGIN}"])
def test_a_readme_without_both_markers_is_an_error(tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]):
    readme = tmp_path / "README.md"
    readme.write_text(text)
    assert main([str(readme)]) == 2
    assert "metrics:begin" in capsys.readouterr().err
    assert main([str(tmp_path / "missing")]) == 2
