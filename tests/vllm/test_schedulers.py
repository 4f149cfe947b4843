"""Exactly one observation an iteration, of what vLLM's own scheduler classes decided, in every way they are run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.vllm.scheduler import Witness
from metrics.vllm import DIRECTORY_VARIABLE
from tests.benchmarks.export_model import write_tiny_model
from tests.vllm.driven import Core, make_core


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    write_tiny_model(path)
    return path


@pytest.fixture
def make(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    def core(**options: Any) -> Core:
        monkeypatch.setenv(DIRECTORY_VARIABLE, str(tmp_path))
        return make_core(model, tmp_path, **options)

    return core


def test_a_chunk_is_an_iteration(make: Any):
    core = make(budget=64)
    core.add("a", 200, 3)
    core.run()
    assert core.scheduled == [64, 64, 64, 8, 1, 1]
    assert core.check()["prefill"] == 200


def test_prefill_and_decode_of_different_requests_share_an_iteration(make: Any):
    core = make(budget=64)
    core.add("a", 10, 20)
    core.step()
    core.add("b", 100, 5)
    core.run()
    found = core.check()
    assert (found["computed"], found["generated"], found["recomputed"]) == (110, 25, 0)


def test_with_asynchronous_scheduling_the_next_batch_is_scheduled_before_this_one_has_run(make: Any):
    core = make(is_async=True)
    assert "AsyncScheduler" in {kind.__name__ for kind in type(core.scheduler).__mro__}
    core.add("a", 10, 6)
    core.schedule()
    while core.scheduler.has_unfinished_requests():
        core.schedule()
        core.update()
        core.check()
    core.drain()
    assert core.check()["generated"] == 6


def test_what_was_scheduled_for_a_sequence_that_had_ended_is_scheduled_and_not_generated(make: Any):
    core = make(is_async=True)
    core.add("a", 10, 50, ignore_eos=False, stop_token_ids=[7])
    core.schedule()
    core.schedule()
    core.update(token=7)
    core.drain()
    found = core.check()
    assert (found["generated"], found["decode"], found["iterations"]) == (1, 1, 2)


def test_pipeline_stages_have_several_batches_on_their_way(make: Any):
    core = make(stages=2)
    for name in "abcd":
        core.add(name, 20, 4)
    while core.scheduler.has_unfinished_requests():
        for _ in range(2):
            core.schedule()
        core.drain()
    assert core.check()["generated"] == 16


@pytest.mark.parametrize("is_async", [False, True])
def test_a_preempted_request_is_recomputed_and_counted_so(make: Any, is_async: bool):
    core = make(num_blocks=9, is_async=is_async)
    core.add("a", 48, 40)
    core.add("b", 48, 40)
    core.run()
    found = core.check()
    assert found["preemptions"] >= 1
    assert found["recomputed"] >= 48
    assert (found["computed"], found["generated"]) == (96, 80)


def test_speculated_tokens_are_scheduled_and_only_accepted_ones_generated(make: Any):
    speculative = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2}
    core = make(speculative=speculative)
    core.add("a", 10, 9)
    core.step(drafts=3)
    core.step(accepted=1, drafts=3)  # one and the one after it, of four scheduled
    found = core.check()
    assert (found["decode"], found["generated"]) == (4, 3)
    core.run(accepted=3, drafts=3)
    found = core.check()
    assert found["generated"] == 9
    assert found["recomputed"] == 0


def test_an_abort_while_the_batch_runs_leaves_its_tokens_scheduled(make: Any):
    core = make()
    core.add("a", 10, 5)
    core.add("b", 20, 5)
    core.schedule()
    core.abort("a")
    core.update()
    core.run()
    found = core.check()
    assert (found["computed"], found["generated"]) == (30, 5)


def test_cached_prefixes_are_not_computed(make: Any):
    core = make(prefix_caching=True)
    core.add("a", 64, 2)
    core.run()
    core.add("b", 64, 2)
    core.run()
    assert core.check()["computed"] == 64 + 16  # of the last block a token must be computed, and so its block is


def test_an_engine_that_is_put_to_sleep_preempts_what_runs(make: Any):
    core = make()
    core.add("a", 30, 5)
    core.step()
    core.scheduler.reset_prefix_cache(reset_running_requests=True)
    core.run()
    found = core.check()
    assert (found["preemptions"], found["recomputed"], found["computed"]) == (1, 30, 30)


def test_batches_without_tokens_are_no_iterations(make: Any):
    core = make()
    core.add("a", 4, 1)
    core.run()
    core.step()
    core.step()
    assert core.check()["iterations"] == 1


@pytest.mark.parametrize("method", ["preempted", "scheduled", "updated", "tell"])
def test_a_fault_in_any_method_of_ours_is_counted_and_every_request_is_answered(
    make: Any, monkeypatch: pytest.MonkeyPatch, method: str
):
    def fail(*args: Any) -> None:
        raise RuntimeError("ours")

    monkeypatch.setattr(Witness, method, fail)
    core = make(num_blocks=9)
    core.add("a", 48, 40)
    core.add("b", 48, 40)
    core.run()
    assert core.num_generated == 80
    core.scheduler.__dict__["_wholebatch_witness"]._store.commit()
    assert core.figures()["errors"] >= (1 if method == "preempted" else core.num_run)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), is_async=st.booleans(), budget=st.sampled_from([16, 64]), depth=st.integers(1, 3))
def test_whatever_is_done_every_iteration_is_counted_once_and_whole(
    make: Any, data: st.DataObject, is_async: bool, budget: int, depth: int
):
    core = make(is_async=is_async, budget=budget, num_blocks=24)
    before = core.figures()
    names = iter(range(100))
    for _ in range(data.draw(st.integers(1, 25))):
        action = data.draw(st.sampled_from(["add", "step", "step", "abort"]))
        if action == "add":
            core.add(str(next(names)), data.draw(st.integers(1, 90)), data.draw(st.integers(1, 20)))
        elif action == "abort" and core.scheduler.requests:
            core.abort(data.draw(st.sampled_from(sorted(core.scheduler.requests))))
        else:
            core.schedule()
            if len(core.in_flight) >= (depth if is_async else 1):
                core.update()
    core.drain()
    core.run()
    after = core.figures()
    grown = {name: after[name] - before[name] for name in after}
    assert grown["errors"] == 0
    assert grown["iterations"] == core.num_run == len(core.scheduled)
    assert grown["scheduled"] == sum(core.scheduled) == grown["prefill"] + grown["decode"]
    assert grown["generated"] == core.num_generated
    assert grown["prefill"] == grown["computed"] + grown["recomputed"]
