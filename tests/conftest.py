"""What every test shares: Hypothesis profiles, the default model, and the rule that CI skips nothing."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

IN_CI = os.environ.get("CI") == "true"

os.environ.setdefault("HF_HUB_OFFLINE", "1")

hypothesis.settings.register_profile("dev", max_examples=100, deadline=None)
hypothesis.settings.register_profile(
    "ci",
    max_examples=1000,
    deadline=None,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.register_profile("soak", max_examples=50_000, deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if IN_CI else "dev"))


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):
    """In CI what a test needs must be there: a skip is a failure."""
    outcome = yield
    report = outcome.get_result()
    if IN_CI and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped in CI: {report.longrepr}"


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """A directory of the test's own, with a short path: the path of a Unix socket has at most 107 bytes, and
    pytest's own directories, which pytest-xdist nests deeper, leave too few of them."""
    with tempfile.TemporaryDirectory(prefix="wb-") as directory:
        yield Path(directory)


@pytest.fixture(scope="session")
def default_model() -> Path:
    """The default model's GGUF file, as `make serve` and `make test` fetch it."""
    cache = Path(os.environ.get("WHOLEBATCH_CACHE", Path.home() / ".cache" / "wholebatch"))
    path = cache / "SmolLM2-135M-Instruct.Q4_1.gguf"
    if not path.exists():
        pytest.skip("the default model is not there: run `make model`")
    return path
