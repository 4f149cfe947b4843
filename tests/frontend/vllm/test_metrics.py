"""What `GET /metrics` answers in vLLM's API servers: theirs less what ours replace, and ours; the same from each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from frontend.vllm import Metrics, middleware
from metrics.files import StoreError, TallyStore
from metrics.vllm import DIRECTORY_VARIABLE, CoreFacts, open_core

THEIRS = """\
# HELP vllm:num_requests_running Running.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} 1.0
# HELP vllm:iteration_tokens_total Partial.
# TYPE vllm:iteration_tokens_total histogram
vllm:iteration_tokens_total_bucket{engine="0",le="+Inf",model_name="m"} 330.0
vllm:iteration_tokens_total_count{engine="0",model_name="m"} 330.0
vllm:iteration_tokens_total_sum{engine="0",model_name="m"} 6336.0
# HELP vllm:iteration_tokens_total_created Partial.
# TYPE vllm:iteration_tokens_total_created gauge
vllm:iteration_tokens_total_created{engine="0",model_name="m"} 1.7e+09
# HELP process_open_fds Of one process.
# TYPE process_open_fds gauge
process_open_fds 9.0
# HELP vllm:prompt_tokens_total Prompts.
# TYPE vllm:prompt_tokens_total counter
vllm:prompt_tokens_total{engine="0",model_name="m"} 4800.0
"""


class TheirApp:
    """Answers as vLLM's application; remembers what it was asked."""

    def __init__(self, status: int = 200) -> None:
        self.status = status
        self.asked: list[dict[str, Any]] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.asked.append(scope)
        body = THEIRS.encode() if scope["path"].startswith("/metrics") else b"other"
        headers = [(b"content-type", b"text/plain; version=0.0.4"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": self.status, "headers": headers})
        await send({"type": "http.response.body", "body": body[:10], "more_body": True})
        await send({"type": "http.response.body", "body": body[10:]})


async def get(app: Metrics, path: str = "/metrics", method: str = "GET") -> tuple[int, dict[bytes, bytes], str]:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "headers": [(b"accept-encoding", b"gzip"), (b"host", b"h")],
    }
    await app(scope, None, send)  # type: ignore[arg-type]
    body = b"".join(message.get("body", b"") for message in sent[1:])
    return sent[0]["status"], dict(sent[0]["headers"]), body.decode()


def samples(text: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    found: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            key = sample.name, frozenset(sample.labels.items())
            assert key not in found, f"{key} stands twice"
            found[key] = sample.value
    return found


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(DIRECTORY_VARIABLE, str(tmp_path))
    return tmp_path


def a_core(index: int = 0) -> TallyStore:
    return open_core(index, CoreFacts(model_name="m", custom_buckets={"iteration_tokens": [1.0, 8.0]}))


def observe(core: TallyStore, tokens: float) -> None:
    core.tally.observe(core.tally.layout.histogram("vllm:iteration_tokens_total"), tokens)
    core.commit()


ENGINE_0 = frozenset({("engine", "0"), ("model_name", "m")})


async def test_iterations_are_whole_and_everything_else_is_theirs():
    core = a_core()
    observe(core, 5)
    status, headers, text = await get(Metrics(TheirApp()))
    found = samples(text)
    assert status == 200
    assert headers[b"content-length"] == str(len(text.encode())).encode()
    assert found["vllm:iteration_tokens_total_count", ENGINE_0] == 1
    assert found["vllm:iteration_tokens_total_sum", ENGINE_0] == 5
    assert found["vllm:iteration_tokens_total_bucket", ENGINE_0 | {("le", "8.0")}] == 1
    assert found["vllm:num_requests_running", ENGINE_0] == 1
    assert found["vllm:prompt_tokens_total", ENGINE_0] == 4800
    assert ("vllm:iteration_tokens_total_created", ENGINE_0) not in found


async def test_every_process_says_what_it_uses_and_nothing_stands_twice():
    core = a_core(1)
    observe(core, 1)
    apps = [Metrics(TheirApp()) for _ in range(3)]
    _, _, text = await get(apps[2])
    fds = {labels: value for (name, labels), value in samples(text).items() if name == "process_open_fds"}
    names = {dict(labels)["process"] for labels in fds}
    assert names == {"engine-1", "api-server-0", "api-server-1", "api-server-2"}
    assert all(value > 0 for labels, value in fds.items() if ("process", "engine-1") not in labels)


async def test_whoever_answers_says_the_same():
    core = a_core()
    apps = [Metrics(TheirApp()) for _ in range(2)]
    for tokens in (1, 3, 20):
        observe(core, tokens)
        answers = [samples((await get(app))[2])["vllm:iteration_tokens_total_sum", ENGINE_0] for app in apps]
        assert len(set(answers)) == 1


async def test_while_no_core_counts_their_answer_goes_out_as_it_is():
    status, _, text = await get(Metrics(TheirApp()))
    assert (status, text) == (200, THEIRS)


async def test_without_a_directory_they_are_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setenv(DIRECTORY_VARIABLE, str(tmp_path / "missing"))
    app = TheirApp()
    assert (await get(Metrics(app)))[2] == THEIRS
    assert app.asked[0]["headers"][0] == (b"accept-encoding", b"gzip")
    assert len(caplog.records) == 1


async def test_a_fault_of_ours_gives_their_answer_and_is_counted(directory: Path, monkeypatch: pytest.MonkeyPatch):
    observe(a_core(), 5)
    app = Metrics(TheirApp())

    def fail(*args: Any) -> Any:
        raise StoreError("ours")

    with monkeypatch.context() as broken:
        broken.setattr(middleware, "find_cores", fail)
        for _ in range(2):
            assert (await get(app))[2] == THEIRS
    errors = {
        dict(labels)["where"]: value
        for (name, labels), value in samples((await get(app))[2]).items()
        if name == "wholebatch:vllm_hook_errors_total" and ("process", "api-server-0") in labels
    }
    assert errors["scrape"] == 2


@pytest.mark.parametrize(
    ("path", "method", "is_ours"),
    [
        ("/metrics", "GET", True),
        ("/metrics/", "GET", True),
        ("/metrics/engines", "GET", True),
        ("/metrics", "POST", False),
        ("/v1/models", "GET", False),
    ],
)
async def test_only_scrapes_are_answered_here(path: str, method: str, is_ours: bool):
    observe(a_core(), 5)
    _, _, text = await get(Metrics(TheirApp()), path, method)
    assert ("wholebatch:iterations_total" in text) is is_ours


async def test_what_they_refuse_stays_refused():
    observe(a_core(), 5)
    status, _, text = await get(Metrics(TheirApp(status=503)))
    assert (status, text) == (503, THEIRS)
