"""The servers that are compared: ours and vLLM, started here, or any that runs already; what each costs the machine.

vLLM is served from a virtual environment of its own, which `install_vllm.sh` makes, on every core and in float32, with
Intel's OpenMP in front as its installation guide recommends, and without a prefix cache.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import psutil

from metrics.catalogue import API_SERVER
from tests.e2e.harness import served

ROOT = Path(__file__).parent.parent.parent
VLLM = "vllm.entrypoints.cli.main"
VLLM_WITH_US = "engine.vllm.command"
NOTHING_MORE: Mapping[str, str] = MappingProxyType({})
VLLM_START_S = 400.0
VLLM_KV_CACHE_GIB = 2  # enough for 128 requests of this benchmark's; vLLM's own choice is larger


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One server under load."""

    name: str
    url: str
    model: str
    pid: int | None = None  # of the process whose tree the server is; None: not known, nothing is said of it
    api_server_pids: tuple[int, ...] = ()
    ready_s: float | None = None  # from its start until it was ready; None: it was running

    def processes(self) -> list[psutil.Process]:
        if self.pid is None:
            return []
        root = psutil.Process(self.pid)
        return [root, *root.children(recursive=True)]

    def cpu_s(self) -> dict[int, float]:
        """Processor time of each process until now, by pid."""
        times = {process.pid: process.cpu_times() for process in self.processes()}
        return {pid: spent.user + spent.system for pid, spent in times.items()}

    def title(self, pid: int) -> str:
        """What a process is, in a word or two."""
        if pid in self.api_server_pids:
            return "API server"
        return Path(psutil.Process(pid).cmdline()[0]).name

    def memory_mib(self) -> float:
        """Resident memory of the whole tree; what processes share counts once."""
        return sum(process.memory_full_info().pss for process in self.processes()) / 2**20


@contextlib.contextmanager
def alone(side: Side, sides: Sequence[Side]) -> Iterator[None]:
    """Stop the other sides, so that what they do when idle (vLLM's worker polls) does not slow this one.

    Of each, the root last and woken last: it watches its children.
    """
    others = [process for other in sides if other is not side for process in reversed(other.processes())]
    for process in others:
        process.suspend()
    try:
        yield
    finally:
        for process in others:
            process.resume()


@contextlib.contextmanager
def ours(model: Path, *flags: str) -> Iterator[Side]:
    """Our own server, on as many threads as it takes by itself."""
    flags = ("--served-model-name", "model", "--no-enable-prefix-caching", *flags)
    began = time.perf_counter()
    with served(model, *flags, num_threads=None) as deployment:
        yield Side(
            name="ours",
            url=deployment.url,
            model="model",
            pid=deployment.process.pid,
            api_server_pids=tuple(deployment.pids(API_SERVER)),
            ready_s=time.perf_counter() - began,
        )


def vllm_environment(venv: Path) -> dict[str, str]:
    """What vLLM's CPU build is told, beside its flags. It must ask no network for anything."""
    return {
        **os.environ,
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{len(os.sched_getaffinity(0)) - 1}",
        "VLLM_CPU_KVCACHE_SPACE": str(VLLM_KV_CACHE_GIB),
        "LD_PRELOAD": str(venv / "lib" / "libiomp5.so"),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "PYTHONPATH": str(ROOT),
    }


@contextlib.contextmanager
def vllm(
    venv: Path, model: Path, *flags: str, program: str = VLLM, more: Mapping[str, str] = NOTHING_MORE
) -> Iterator[Side]:
    """vLLM on a Hugging Face directory (`export_model` writes one), started by itself or by `wholebatch-vllm`."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [str(venv / "bin" / "python"), "-m", program, "serve", str(model)]
    command += ["--served-model-name", "model", "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    command += ["--no-enable-prefix-caching", "--max-model-len", "2048", *flags]
    began = time.perf_counter()
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            command,
            env=vllm_environment(venv) | dict(more),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            url = f"http://127.0.0.1:{port}"
            while not _answers(url):
                if process.poll() is not None or time.perf_counter() > began + VLLM_START_S:
                    output.seek(0)
                    raise SystemExit(f"vLLM does not start:\n{output.read()[-4000:]}")
                time.sleep(0.05)
            ready_s = time.perf_counter() - began
            pid = process.pid
            yield Side(name="vLLM", url=url, model="model", pid=pid, api_server_pids=(pid,), ready_s=ready_s)
        finally:
            _end(process)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/v1/models", timeout=1):
            return True
    except (urllib.error.URLError, OSError):
        return False


def _end(process: subprocess.Popen[bytes]) -> None:
    family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(20)
    process.kill()
    for child in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    process.wait()


def running(url: str, model: str, pid: int | None) -> Side:
    """A server that somebody else has started; the named process is its API server."""
    return Side(name="other", url=url, model=model, pid=pid, api_server_pids=() if pid is None else (pid,))
