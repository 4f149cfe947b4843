"""Whatever the environment says: the command serves, or says in one line why not, and never with a traceback."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.e2e.harness import ROOT, wait_for

# A start that ends at once takes half a second, a whole one ten times as long.
SHARE_OF_REFUSALS, SHARE_OF_STARTS = 50, 200
READ_ONLY = "/proc/self"  # exists, and nobody can make anything in it
HERE = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)}


def fewer(share: int) -> settings:
    return settings(
        max_examples=max(2, settings().max_examples // share),
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    )


texts = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=30)
places = st.one_of(
    st.sampled_from(["", ".", "/", "~", READ_ONLY, "/nowhere/at/all", "/dev/null", "/" + "x" * 300]), texts
)
threads = st.one_of(
    st.sampled_from(["", "1", "2", "1,1", "0", "-1", "99999999999", "many"]), st.integers(-9, 10**12).map(str), texts
)
environments = st.fixed_dictionaries(
    {},
    optional={
        "HOME": places,
        "TMPDIR": places,
        "XDG_RUNTIME_DIR": places,
        "XDG_CACHE_HOME": places,
        "NUMBA_CACHE_DIR": places,
        "OMP_NUM_THREADS": threads,
        "OMP_WAIT_POLICY": texts,
        "GOMP_SPINCOUNT": texts,
        "WHOLEBATCH_API_KEY": texts,
        "HF_HOME": places,
        "LANG": texts,
        "LC_ALL": st.one_of(texts, st.sampled_from(["C", "POSIX", "de_DE.ISO-8859-1"])),
        "TERM": texts,
        "COLUMNS": texts,
        "NO_COLOR": texts,
        "CUDA_VISIBLE_DEVICES": texts,
    },
)


def start(directory: Path, *flags: str, environment: Mapping[str, str], output: Any) -> subprocess.Popen[bytes]:
    """In a directory of its own, since some of the places are relative ones."""
    command = [sys.executable, "-m", "engine.serve", *flags, "--runtime-dir", str(directory / "run")]
    return subprocess.Popen(
        command, cwd=directory, env=HERE | dict(environment), stdout=output, stderr=subprocess.STDOUT
    )


def assert_says_why_in_one_line(code: int, said: bytes) -> None:
    lines = said.decode(errors="replace").splitlines()
    own = [line for line in lines if " level=" not in line]
    assert code == 2, lines
    assert len(own) == 1, lines
    assert own[0].startswith("engine.serve: "), lines


@pytest.fixture(scope="module")
def taken_port() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        yield str(taken.getsockname()[1])


@fewer(SHARE_OF_REFUSALS)
@given(environment=environments)
@example(environment={})
@example(environment={"OMP_NUM_THREADS": "99999999999"})
@example(environment={"HOME": READ_ONLY, "TMPDIR": READ_ONLY})
def test_what_cannot_be_served_is_one_line_in_any_environment(
    tiny_model: Path, tmp_path: Path, taken_port: str, environment: dict[str, str]
):
    """The port is taken: every start ends there, or before."""
    flags = ("--model", str(tiny_model), "--port", taken_port)
    with start(tmp_path, *flags, environment=environment, output=subprocess.PIPE) as process:
        said, _ = process.communicate(timeout=120)
    assert_says_why_in_one_line(process.returncode, said)


@fewer(SHARE_OF_REFUSALS)
@given(environment=environments, cache=places)
@example(environment={}, cache=READ_ONLY)
@example(environment={"HOME": ""}, cache="two\nlines")
def test_a_default_model_that_cannot_be_had_is_one_line_in_any_environment(
    tmp_path: Path, taken_port: str, environment: dict[str, str], cache: str
):
    """Nothing is fetched: there is no pip to be found, and no index."""
    where = {"WHOLEBATCH_CACHE": f"{READ_ONLY}/{cache}", "PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": "/dev/null"}
    with start(tmp_path, "--port", taken_port, environment=environment | where, output=subprocess.PIPE) as process:
        said, _ = process.communicate(timeout=120)
    _, found, why = said.partition(b"engine.serve: ")  # after the line that it is being fetched
    assert b"Traceback" not in said
    assert_says_why_in_one_line(process.returncode, found + why)


@fewer(SHARE_OF_STARTS)
@given(environment=environments)
@example(environment={"HOME": READ_ONLY, "TMPDIR": READ_ONLY, "XDG_CACHE_HOME": READ_ONLY, "OMP_NUM_THREADS": "1"})
def test_it_serves_or_says_why_not_in_any_environment(tiny_model: Path, tmp_path: Path, environment: dict[str, str]):
    flags = ("--model", str(tiny_model), "--port", "0", "--num-gpu-blocks-override", "64", "--max-model-len", "128")
    log = tmp_path / "log"
    with log.open("wb") as output:
        process = start(tmp_path, *flags, environment=environment, output=output)

    def has_come() -> bool:
        return process.poll() is not None or re.search(rb"^ready url=", log.read_bytes(), re.MULTILINE) is not None

    try:
        wait_for(has_come, "the ready line or an end", 120.0)
        process.send_signal(signal.SIGTERM)
        code = process.wait(60)
    finally:
        process.kill()
        process.wait()
    assert b"Traceback" not in log.read_bytes()
    if code != 0:
        assert_says_why_in_one_line(code, log.read_bytes())
