"""The supervisor's audit: from tally files to findings, without false alarms, and without ever failing."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.supervisor.auditor import AUDIT_S, Auditor, Observation, judge, ready_incarnations
from engine.wire.deployment import Deployment, Facts, ProcessEntry
from metrics.catalogue import API_SERVER, ENGINE, SUPERVISOR
from metrics.catalogue.metric import AUDIT_LAWS
from metrics.files.store import TallyReader, TallyStore, tally_path
from metrics.laws import Status
from metrics.layout import Shape, build_layout

SHAPE = Shape(num_engines=1, num_api_servers=2, max_model_len=512)
FACTS = Facts(
    model_name="tiny",
    max_model_len=SHAPE.max_model_len,
    vocab_size=300,
    block_size=16,
    num_gpu_blocks=64,
    cache_dtype="float32",
    enable_prefix_caching=True,
)


def table(*, state: str = "ready", incarnation: int = 1, facts: Facts | None = FACTS) -> Deployment:
    rows = [
        ProcessEntry(role=SUPERVISOR, index=0, incarnation=1, pid=1, state="ready"),
        ProcessEntry(role=ENGINE, index=0, incarnation=1, pid=2, state="ready"),
        ProcessEntry(role=API_SERVER, index=0, incarnation=incarnation, pid=3, state=state),
        ProcessEntry(role=API_SERVER, index=1, incarnation=1, pid=4, state="ready"),
    ]
    return Deployment(version=1, facts=facts, processes=tuple(rows))


class Files:
    """The tallies of one engine and two API servers, written by hand."""

    def __init__(self, directory: Path) -> None:
        self.directory = str(directory)
        self.stores = {
            (role, index): TallyStore.open(
                tally_path(self.directory, role, index), build_layout(role, SHAPE), incarnation=1, now_unix=1.0
            )
            for role, index in ((ENGINE, 0), (API_SERVER, 0), (API_SERVER, 1))
        }
        self.auditor = Auditor(self.directory, SHAPE, log_stats=True)
        self.reader = TallyReader(tally_path(self.directory, SUPERVISOR, 0), build_layout(SUPERVISOR, SHAPE))
        self.now = 0.0

    def inc(self, role: str, index: int, name: str, amount: float, **labels: str) -> None:
        store = self.stores[role, index]
        if role == API_SERVER:
            labels["engine"] = "0"
        store.tally.inc(store.tally.layout.cell(name, **labels), amount)
        store.commit()

    def set_running(self, number: int) -> None:
        store = self.stores[ENGINE, 0]
        store.tally.set(store.tally.layout.cell("vllm:num_requests_running"), number)
        store.commit()

    def generate(self, num_tokens: int) -> None:
        """One iteration of decodes."""
        store = self.stores[ENGINE, 0]
        layout = store.tally.layout
        store.tally.inc(layout.cell("vllm:generation_tokens_total"), num_tokens)
        store.tally.inc(layout.cell("wholebatch:iterations_total", phase="decode"))
        for name in ("vllm:iteration_tokens_total", "wholebatch:iteration_scheduled_tokens"):
            store.tally.observe(layout.histogram(name), num_tokens)
        store.commit()

    def audit(self, what: Deployment | None = None) -> None:
        self.auditor.turn(table() if what is None else what, self.now)
        self.now += AUDIT_S

    def counted(self, name: str, **labels: str) -> float:
        return float(self.reader.read().cells[build_layout(SUPERVISOR, SHAPE).cell(name, **labels)])

    def violations(self) -> dict[str, float]:
        found = {law: self.counted("wholebatch:audit_violations_total", law=law) for law in AUDIT_LAWS}
        return {law: number for law, number in found.items() if number}

    def imbalance(self, law: str) -> float:
        return self.counted("wholebatch:audit_imbalance_tokens", law=law)


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


def test_starts_of_api_servers_are_counted_whether_they_get_ready_or_not(files: Files):
    def starts() -> list[float]:
        return [files.counted("wholebatch:api_server_starts_total", api_server=index) for index in ("0", "1")]

    files.audit()
    assert starts() == [1, 1]
    files.audit(table(incarnation=4, state="ended"))
    files.audit(table(incarnation=4, state="starting"))
    assert starts() == [4, 1]


def test_books_that_balance_raise_no_alarm(files: Files):
    files.generate(10)
    files.inc(API_SERVER, 0, "wholebatch:received_tokens_total", 6)
    files.inc(API_SERVER, 1, "wholebatch:received_tokens_total", 4)
    files.inc(API_SERVER, 0, "wholebatch:delivered_tokens_total", 6)
    files.inc(API_SERVER, 1, "wholebatch:undelivered_tokens_total", 4, reason="disconnect")
    for _ in range(3):
        files.audit()
    assert files.violations() == {}


def test_tokens_that_nobody_has_are_found_once_the_deployment_has_rested(files: Files):
    files.generate(10)
    files.inc(API_SERVER, 0, "wholebatch:received_tokens_total", 7)
    files.inc(API_SERVER, 0, "wholebatch:delivered_tokens_total", 7)
    files.audit()
    assert files.violations() == {}
    files.audit()
    assert files.violations() == {"tokens": 1}
    assert files.imbalance("tokens") == 3
    files.audit()
    assert files.violations() == {"tokens": 2}
    files.inc(ENGINE, 0, "wholebatch:lost_tokens_total", 3, reason="server_lost", api_server="1")
    files.audit()
    files.audit()
    assert files.violations() == {"tokens": 2}
    assert files.imbalance("tokens") == 0


def test_tokens_on_their_way_are_no_violation_while_something_runs(files: Files):
    files.generate(10)
    files.set_running(1)
    files.audit()
    files.audit()
    assert files.violations() == {}


def test_more_received_than_was_ever_generated_is_a_violation_also_while_something_runs(files: Files):
    files.generate(10)
    files.set_running(1)
    files.inc(API_SERVER, 0, "wholebatch:received_tokens_total", 12)
    files.audit()
    files.generate(1)
    files.audit()
    assert files.violations() == {"tokens": 1}
    assert files.imbalance("tokens") == 1


@pytest.mark.parametrize("second", [table(state="starting"), table(state="ended"), table(incarnation=2)])
def test_what_a_dead_process_left_open_is_no_violation_before_its_successor_had_time_to_settle_it(
    files: Files, second: Deployment
):
    files.generate(10)
    files.inc(API_SERVER, 0, "wholebatch:received_tokens_total", 7)
    files.audit()
    files.audit(second)
    assert files.violations() == {}


def test_a_tally_that_cannot_be_read_any_more_stops_the_audit_and_is_no_violation(files: Files):
    files.generate(10)
    files.inc(API_SERVER, 0, "wholebatch:received_tokens_total", 10)
    files.inc(API_SERVER, 0, "wholebatch:delivered_tokens_total", 10)
    files.audit()
    Path(tally_path(files.directory, API_SERVER, 0)).unlink()
    files.audit()
    files.audit()
    assert files.violations() == {}


def test_nothing_is_audited_before_the_facts_are_known(files: Files):
    files.generate(10)
    files.audit(table(facts=None))
    files.audit(table(facts=None))
    assert files.violations() == {}


def test_a_fault_of_the_audit_is_counted_logged_once_and_goes_no_further(
    files: Files, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def fail(*args: object) -> None:
        raise OSError("the disk is on fire")

    monkeypatch.setattr("engine.supervisor.auditor.judge", fail)
    for _ in range(4):
        files.audit()
    assert files.counted("wholebatch:bulkhead_errors_total", where="audit") == 3
    assert len([r for r in caplog.records if "on fire" in r.message]) == 1


def test_a_commit_that_fails_is_counted_and_the_next_one_makes_up_for_it(files: Files, monkeypatch: pytest.MonkeyPatch):
    commit = TallyStore.commit

    def full(store: TallyStore) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(TallyStore, "commit", full)
    files.audit()
    monkeypatch.setattr(TallyStore, "commit", commit)
    files.audit()
    assert files.counted("wholebatch:bulkhead_errors_total", where="commit") == 1


def test_the_supervisor_has_process_figures_of_its_own(files: Files):
    files.audit()
    assert files.counted("process_resident_memory_bytes") > 0


def test_a_violation_is_logged_with_both_sides(files: Files, caplog: pytest.LogCaptureFixture):
    files.generate(10)
    for _ in range(4):
        files.audit()
    lines = [r.message for r in caplog.records if "audit_violation" in r.message]
    assert len(lines) == 1
    assert "law=tokens engine=0 imbalance=10" in lines[0]


def test_the_audit_is_exact_only_where_every_process_was_ready_both_times():
    samples = {
        ("wholebatch:received_tokens_total", frozenset({("engine", "0")})): 3.0,
        ("wholebatch:delivered_tokens_total", frozenset({("engine", "0")})): 1.0,
        ("wholebatch:undelivered_tokens_total", frozenset({("engine", "0"), ("reason", "stop")})): 0.0,
    }

    def violated(first: Deployment, second: Deployment) -> bool:
        one, two = (Observation(samples=samples, incarnations=ready_incarnations(t)) for t in (first, second))
        return any(finding.status is Status.VIOLATED for finding in judge(one, two))

    assert violated(table(), table())
    assert not violated(table(), table(state="ended"))
    assert not violated(table(state="starting"), table(state="starting"))
    assert not violated(table(), table(incarnation=2))
