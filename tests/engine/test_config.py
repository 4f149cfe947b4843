"""The configuration's way to an engine process, and a deployment's directory."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.config import (
    CacheConfig,
    EngineConfig,
    ModelConfig,
    SchedulerConfig,
    StatsConfig,
    engine_config_from_json,
    to_json,
)
from engine.supervisor.directory import DeploymentDirectory, DirectoryError
from engine.wire.deployment import Facts

CONFIG = EngineConfig(
    index=0,
    incarnation=1,
    num_engines=1,
    num_api_servers=4,
    directory="/run/x",
    served_model_name="tiny",
    lifeline_fd=5,
    model=ModelConfig(path="/models/tiny"),
)
whole = st.integers(0, 2**40)
models = st.builds(ModelConfig, path=st.text(), max_model_len=st.none() | whole, seed=whole)
caches = st.builds(CacheConfig, block_size=whole, num_gpu_blocks_override=st.none() | whole)
schedulers = st.builds(SchedulerConfig, max_num_seqs=whole, long_prefill_token_threshold=whole)
bounds = st.lists(st.floats(allow_nan=False, allow_infinity=False), max_size=3).map(tuple)
statistics = st.builds(
    StatsConfig,
    lease_s=st.floats(0, 10),
    bucket_overrides=st.lists(st.tuples(st.text(), bounds), max_size=2).map(tuple),
)
facts = st.builds(
    Facts,
    model_name=st.text(),
    max_model_len=whole,
    vocab_size=whole,
    block_size=whole,
    num_gpu_blocks=whole,
    cache_dtype=st.text(),
    enable_prefix_caching=st.booleans(),
)


@given(models, caches, schedulers, statistics, st.none() | facts)
def test_what_is_read_is_what_was_written(model, cache, scheduler, stats, found):
    config = replace(CONFIG, model=model, cache=cache, scheduler=scheduler, stats=stats, facts=found)
    assert engine_config_from_json(to_json(config)) == config


def test_a_directory_is_private_and_gone_after_its_end(tmp_path: Path):
    runtime = tmp_path / "deep" / "run"
    directory = DeploymentDirectory.create(runtime)
    assert directory.path.parent == runtime
    assert directory.path.stat().st_mode & 0o777 == 0o700
    (directory.path / "engine-0.tally").write_bytes(b"1")
    directory.remove()
    assert not list(runtime.iterdir())


def test_directories_of_living_supervisors_stay_and_those_of_dead_ones_go(tmp_path: Path):
    dead = DeploymentDirectory.create(tmp_path)
    os.close(dead._lock)  # as the kernel does when a process is killed
    alive = DeploymentDirectory.create(tmp_path)
    third = DeploymentDirectory.create(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {alive.path.name, third.path.name}


@pytest.mark.parametrize(("path", "word"), [("file/run", "Not a directory"), ("x" * 90, "too long")])
def test_a_directory_that_cannot_be_used_is_named_with_the_reason(tmp_path: Path, path: str, word: str):
    (tmp_path / "file").write_text("")
    with pytest.raises(DirectoryError, match=word) as refused:
        DeploymentDirectory.create(tmp_path / path)
    assert str(tmp_path / path) in str(refused.value)


def test_a_directory_that_others_may_write_to_is_refused(tmp_path: Path):
    tmp_path.chmod(0o777)
    with pytest.raises(DirectoryError, match="others may write"):
        DeploymentDirectory.create(tmp_path)
