"""What the README says of adding a whole-iteration metric, done: its two lines, and a deployment that has it."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from tests.e2e.harness import ROOT, served, total
from tests.e2e.load import asks, run

NAME = "wholebatch:iteration_recomputed_tokens"


def the_two_lines() -> tuple[str, str]:
    text = (ROOT / "README.md").read_text()
    block = re.search(r"## Adding a whole-iteration metric.*?```python\n(.*?)```", text, re.DOTALL)
    assert block is not None
    declaration, observation = filter(None, block.group(1).splitlines())
    return declaration, observation


def insert(path: Path, after: str, line: str) -> None:
    before, found, rest = path.read_text().partition(after)
    assert found, f"{path} has no {after!r}"
    path.write_text(f"{before}{found}\n    {line}{rest}")


def test_the_readmes_two_lines_make_a_metric_that_is_right_at_three_api_servers(tiny_model: Path, tmp_path: Path):
    for package in ("engine", "frontend", "metrics"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    declaration, observation = the_two_lines()
    insert(tmp_path / "metrics" / "catalogue" / "engine.py", "ENGINE_METRICS: Final = (", declaration)
    insert(
        tmp_path / "engine" / "schedule" / "record.py",
        "HISTOGRAMS: Final[Mapping[str, Callable[[IterationCounts], float]]] = {",
        observation,
    )
    flags = ("--api-server-count", "3", "--num-gpu-blocks-override", "48", "--max-model-len", "512")
    with served(tiny_model, *flags, root=tmp_path) as deployment:
        run(deployment, asks(16, prompt_tokens=(80, 160), max_tokens=48, vocab=250), at_a_time=16)
        samples = deployment.idle_metrics()
    assert total(samples, "wholebatch:recomputed_tokens_total") > 0
    assert total(samples, f"{NAME}_sum") == total(samples, "wholebatch:recomputed_tokens_total")
    assert total(samples, f"{NAME}_count") == total(samples, "wholebatch:iterations_total")
