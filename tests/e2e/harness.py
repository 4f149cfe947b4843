"""A whole deployment for a test: real processes on free ports, with a runtime directory of their own.

Not a fixture: a test decides how many of what it starts, and `Served` ends all of it by pid, also on failure.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from prometheus_client.parser import text_string_to_metric_families

from metrics.laws import Status, check

ROOT = Path(__file__).parent.parent.parent

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def wait_for(condition: Callable[[], Any], what: str, timeout_s: float = 60.0) -> Any:
    """The first true value of the condition; AssertionError naming `what` when none comes in time."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.01)
    raise AssertionError(f"did not come within {timeout_s} s: {what}")


def parse(text: str) -> Samples:
    """Every sample of an exposition; a series that stands in it twice is an error."""
    samples: Samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            key = (sample.name, frozenset(sample.labels.items()))
            assert key not in samples, f"series twice: {key}"
            samples[key] = sample.value
    return samples


def total(samples: Samples, name: str, labels: Mapping[str, str] | None = None) -> float:
    """The sum of a name's samples, over every label not named."""
    wanted = set((labels or {}).items())
    return sum(value for (sample, have), value in samples.items() if sample == name and wanted <= have)


def violations(samples: Samples) -> list[str]:
    """Every law that an idle deployment's figures break."""
    found = [finding for finding in check(samples, idle=True) if finding.status is Status.VIOLATED]
    return [f"{f.law} engine {f.engine}: {f.sentence}: {f.detail}" for f in found]


def laws_checked(samples: Samples) -> set[str]:
    """The names of the laws that apply to an idle deployment's figures."""
    return {finding.law for finding in check(samples, idle=True) if finding.status is not Status.NOT_APPLICABLE}


class Served:
    """One running deployment."""

    def __init__(self, process: subprocess.Popen[bytes], directory: Path) -> None:
        self.process = process
        self.runtime_directory = directory / "run"
        self._log = directory / "log"
        self.url = ""

    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def wait_until_ready(self) -> None:
        def ready_line() -> re.Match[str] | None:
            assert self.process.poll() is None, f"ended with {self.process.returncode}:\n{self.log()}"
            return re.search(r"\bready url=(\S+)", self.log())

        try:
            self.url = wait_for(ready_line, "the ready line", 120.0).group(1)
            wait_for(self._all_ready, "every process ready", 60.0)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.log()}") from error

    def _all_ready(self) -> bool:
        return all(p["state"] == "ready" for p in self.deployment()["processes"] if p["role"] != "supervisor")

    def get(self, path: str, timeout_s: float = 30.0, headers: Mapping[str, str] | None = None) -> str:
        url = path if path.startswith("http") else self.url + path
        request = urllib.request.Request(url, headers=dict(headers or {}))
        with urllib.request.urlopen(request, timeout=timeout_s) as answer:
            text: str = answer.read().decode()
        return text

    def post(self, path: str, body: object, timeout_s: float = 120.0) -> tuple[int, Any]:
        """(status, JSON); `body` is JSON, or bytes as they are."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=timeout_s) as answer:
                return answer.status, json.loads(answer.read())
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())

    def complete(self, prompt: str | list[int], max_tokens: int, **more: object) -> dict[str, Any]:
        body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True, **more}
        status, answer = self.post("/v1/completions", body)
        assert status == 200, answer
        assert isinstance(answer, dict)
        return answer

    def deployment(self) -> dict[str, Any]:
        table = json.loads(self.get("/deployment"))
        assert isinstance(table, dict)
        return table

    def pids(self, role: str) -> list[int]:
        rows = [p for p in self.deployment()["processes"] if p["role"] == role]
        return [p["pid"] for p in sorted(rows, key=lambda p: p["index"])]

    def wait_until_restarted(self, pids: Iterable[int]) -> None:
        """Until every process is ready and none of these is among them."""
        gone = set(pids)

        def is_whole() -> bool:
            try:
                rows = self.deployment()["processes"]
            except (OSError, http.client.HTTPException):  # an API server that ends, or starts
                return False
            return all(row["state"] == "ready" and row["pid"] not in gone for row in rows)

        wait_for(is_whole, "every process ready again", 120.0)

    def metrics(self, path: str = "/metrics") -> Samples:
        return parse(self.get(path))

    def idle_metrics(self, timeout_s: float = 30.0) -> Samples:
        """A scrape of the idle deployment: nothing in flight, the engine series there, and two scrapes, at least two
        publish intervals apart, with equal counts."""
        deadline = time.monotonic() + timeout_s
        earlier: Samples = {}
        while time.monotonic() < deadline:
            later = self.metrics()
            if earlier and self._is_settled(earlier, later):
                return later
            earlier = later
            time.sleep(0.15)
        raise AssertionError("the deployment did not become idle")

    def balanced_metrics(self, timeout_s: float = 60.0) -> Samples:
        """A scrape of the idle deployment on which every law of the audit holds exactly: a process that was started
        after a death settles what the dead one left open, and that takes it a moment."""
        deadline = time.monotonic() + timeout_s
        while True:
            samples = self.idle_metrics(timeout_s)
            if not (broken := violations(samples)):
                assert "tokens" in laws_checked(samples), "the laws do not apply: series are missing"
                return samples
            assert time.monotonic() < deadline, broken

    @staticmethod
    def _is_settled(earlier: Samples, later: Samples) -> bool:
        busy = ("vllm:num_requests_running", "vllm:num_requests_waiting", "wholebatch:api_server_requests_in_flight")
        up = [value for (name, _), value in later.items() if name == "wholebatch:exporter_up"]
        names = ("vllm:", "wholebatch:received", "wholebatch:delivered", "wholebatch:iteration")
        moving = ("wholebatch:iteration_stage_seconds_total",)
        keys = [k for k in later if k[0].startswith(names) and k[0] not in moving]
        return (
            bool(up)
            and all(up)
            and not any(total(later, n) for n in busy)
            and all(later[k] == earlier.get(k) for k in keys)
        )

    def stop(self) -> int:
        """SIGTERM, and the exit code; what does not end by itself is killed, and an error."""
        if not self.is_running():
            return self.process.wait()
        family = psutil.Process(self.process.pid).children(recursive=True)
        self.process.send_signal(signal.SIGTERM)
        hangs = False
        try:
            code = self.process.wait(60)
        except subprocess.TimeoutExpired:
            hangs = True
            self.process.kill()
            code = self.process.wait()
        _, left = psutil.wait_procs(family, timeout=10)
        for process in left:
            process.kill()
        assert not hangs, f"did not end:\n{self.log()}"
        assert not left, f"left running: {left}\n{self.log()}"
        return code

    def is_running(self) -> bool:
        return self.process.poll() is None


@contextmanager
def served(
    model: Path, *flags: str, module: str = "engine.serve", num_threads: int | None = 1, root: Path = ROOT
) -> Iterator[Served]:
    """A ready deployment of the model; ended, and its runtime directory removed, on leaving. An engine computes with
    `num_threads`; None: as many as it would by itself. `root` is where the packages are."""
    directory = Path(tempfile.mkdtemp(prefix="wb-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
    command = [sys.executable, "-m", module, "--model", str(model), "--host", "127.0.0.1", "--port", "0"]
    command += ["--admin-port", "0", "--runtime-dir", str(directory / "run"), *flags]
    environment = dict(os.environ)
    if num_threads is not None:
        environment["OMP_NUM_THREADS"] = str(num_threads)
    with (directory / "log").open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, cwd=root, env=environment)
    deployment = Served(process, directory)
    try:
        deployment.wait_until_ready()
        yield deployment
    finally:
        try:
            deployment.stop()
        finally:
            shutil.rmtree(directory, ignore_errors=True)
