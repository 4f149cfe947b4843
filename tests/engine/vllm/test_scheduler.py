"""The witness in a scheduler of another's: what it counts, and that nothing of its own ever reaches that one."""

from __future__ import annotations

import importlib
import logging
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from engine.vllm import make_scheduler
from engine.vllm.command import CommandError, with_our_part
from engine.vllm.scheduler import SCHEDULER_VARIABLE, Witness
from metrics.catalogue import VLLM_ENGINE
from metrics.files import TallyReader, tally_path
from metrics.vllm import DIRECTORY_VARIABLE, CoreFacts, find_cores


class TheirScheduler:
    """Plays vLLM's: one request of 3 prompt tokens, which generates a token a batch."""

    def __init__(self, *, vllm_config: Any) -> None:
        self.requests = {"a": SimpleNamespace(request_id="a", num_prompt_tokens=3, num_computed_tokens=0)}
        self.running = list(self.requests.values())
        self.waiting: list[Any] = []
        self.kv_cache_manager = SimpleNamespace(usage=0.25)

    def schedule(self, throttle_prefills: bool = False) -> Any:
        request = self.requests["a"]
        num = 1 if request.num_computed_tokens else 3
        request.num_computed_tokens += num
        return SimpleNamespace(num_scheduled_tokens={"a": num}, finished_req_ids=set())

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> dict[int, Any]:
        return {0: SimpleNamespace(outputs=[SimpleNamespace(new_token_ids=[7])])}

    def _preempt_request(self, request: Any, timestamp: float, drop_stale_output: bool = False) -> None:
        request.num_computed_tokens = 0


class SchedulerConfig:
    scheduler_cls: Any = "engine.vllm.make_scheduler"

    def get_scheduler_cls(self) -> Any:
        return TheirScheduler if self.scheduler_cls is None else self.scheduler_cls


def vllm_config(index: int = 0, num_api_servers: int = 1) -> Any:
    return SimpleNamespace(
        scheduler_config=SchedulerConfig(),
        parallel_config=SimpleNamespace(
            data_parallel_index=index, data_parallel_rank=0, _api_process_count=num_api_servers
        ),
        model_config=SimpleNamespace(served_model_name=["m", "alias"]),
        observability_config=SimpleNamespace(custom_histogram_buckets=None),
    )


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(DIRECTORY_VARIABLE, str(tmp_path))
    buckets = SimpleNamespace(histogram_buckets=lambda family: [1, 8, 64])
    real = importlib.import_module

    def import_module(name: str) -> Any:
        return buckets if name == "vllm.v1.metrics.buckets" else real(name)

    monkeypatch.setattr(importlib, "import_module", import_module)
    return tmp_path


def figures(directory: Path, index: int = 0) -> dict[str, float]:
    layout = CoreFacts(model_name="m", custom_buckets={"iteration_tokens": [1, 8, 64]}).layout()
    cells = TallyReader(tally_path(str(directory), VLLM_ENGINE, index), layout).read().cells
    tokens = layout.histogram("vllm:iteration_tokens_total")
    errors = [s for s in layout.series if s.metric.name == "wholebatch:vllm_hook_errors_total"]
    return {
        "iterations": cells[tokens.offset : tokens.offset + len(tokens.bounds) + 1].sum(),
        "tokens": cells[tokens.offset + len(tokens.bounds) + 1],
        "recomputed": cells[layout.cell("wholebatch:recomputed_tokens_total")],
        "errors": sum(cells[s.offset] for s in errors),
    }


def step(made: Any) -> None:
    made.update_from_output(made.schedule(), None)


def test_every_iteration_is_in_the_file_before_its_tokens_are_sent(directory: Path):
    made = make_scheduler(vllm_config=vllm_config())
    for number in range(1, 4):
        step(made)
        assert figures(directory) == {"iterations": number, "tokens": 3 + number, "recomputed": 0, "errors": 0}


def test_a_preemption_makes_the_next_prefill_a_recomputation(directory: Path):
    made = make_scheduler(vllm_config=vllm_config())
    step(made)
    made._preempt_request(made.requests["a"], 0.0, drop_stale_output=True)
    step(made)
    assert figures(directory)["recomputed"] == 3


def test_each_engine_core_has_its_own_file_and_says_whose_model_it_is(directory: Path):
    for index in (0, 1):
        step(make_scheduler(vllm_config=vllm_config(index)))
    assert [(core.index, core.facts.model_name) for core in find_cores()] == [(0, "m"), (1, "m")]
    assert figures(directory, 1)["iterations"] == 1


def test_a_core_that_starts_again_goes_on_counting(directory: Path, monkeypatch: pytest.MonkeyPatch):
    now = iter((1.0, 2.0))
    monkeypatch.setattr(time, "time", lambda: next(now))
    step(make_scheduler(vllm_config=vllm_config()))
    step(make_scheduler(vllm_config=vllm_config()))
    assert figures(directory)["iterations"] == 2


@pytest.mark.parametrize("method", ["scheduled", "updated", "preempted", "tell"])
def test_a_fault_of_ours_is_counted_and_theirs_go_on(
    directory: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, method: str
):
    def fail(*args: Any) -> None:
        raise RuntimeError("ours")

    monkeypatch.setattr(Witness, method, fail)
    made = make_scheduler(vllm_config=vllm_config())
    made._preempt_request(made.requests["a"], 0.0)
    for _ in range(3):
        output = made.schedule()
        assert made.update_from_output(output, None)[0].outputs[0].new_token_ids == [7]
    monkeypatch.undo()
    monkeypatch.setenv(DIRECTORY_VARIABLE, str(directory))
    made.__dict__["_wholebatch_witness"]._store.commit()
    assert figures(directory)["errors"] == (1 if method == "preempted" else 3)
    assert len([r for r in caplog.records if "event=bulkhead" in r.message]) == 1


@pytest.mark.parametrize("num_api_servers", [1, 2])
def test_the_engine_cores_line_is_written_where_vllm_has_none(
    directory: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, num_api_servers: int
):
    caplog.set_level(logging.INFO)
    made = make_scheduler(vllm_config=vllm_config(num_api_servers=num_api_servers))
    began = time.monotonic()
    step(made)
    monkeypatch.setattr(time, "monotonic", lambda: began + 20)
    step(made)
    lines = [line for line in caplog.messages if "event=stats" in line]
    assert len(lines) == num_api_servers - 1
    assert all("running=1 waiting=0 kv_cache_usage_pct=25.0" in line for line in lines)


def test_where_ours_cannot_start_theirs_does_and_one_line_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setenv(DIRECTORY_VARIABLE, str(tmp_path / "missing"))
    with caplog.at_level(logging.ERROR):
        made = make_scheduler(vllm_config=vllm_config())
    assert type(made) is TheirScheduler
    (line,) = caplog.messages
    assert "vllm_hook_disabled" in line


def test_a_scheduler_that_the_operator_named_is_the_one_that_counts(directory: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(SCHEDULER_VARIABLE, f"{__name__}.Named")
    made = make_scheduler(vllm_config=vllm_config())
    assert isinstance(made, Named)
    step(made)
    assert figures(directory)["iterations"] == 1


class Named(TheirScheduler):
    """Somebody's own."""


# --- the command ---


def test_the_command_adds_two_public_flags_and_keeps_the_rest():
    ours = ["--scheduler-cls=engine.vllm.make_scheduler", "--middleware=frontend.vllm.Metrics"]
    assert with_our_part(["serve", "m", "--port", "1"]) == (["serve", "m", "--port", "1", *ours], None)
    assert with_our_part(["serve", "m", "--scheduler-cls", "a.B"]) == (["serve", "m", *ours], "a.B")
    assert with_our_part(["serve", "--scheduler_cls=a.B", "m"]) == (["serve", "m", *ours], "a.B")


@pytest.mark.parametrize("arguments", [[], ["bench"], ["--help"], ["serve", "--scheduler-cls"]])
def test_what_it_cannot_run_is_told_in_one_line(arguments: list[str]):
    with pytest.raises(CommandError) as caught:
        with_our_part(arguments)
    assert "\n" not in str(caught.value)
