"""The audit's laws: books that balance pass, and each single imbalance is caught."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metrics import audit
from metrics.catalogue import API_SERVER, ENGINE, METRICS
from metrics.catalogue.metric import AUDIT_LAWS, Scope
from metrics.exposition import Renderer, Template
from metrics.laws import (
    COUNTERS,
    LAWS,
    Finding,
    LabelSet,
    Law,
    Samples,
    Status,
    check,
    check_running,
    is_idle,
    samples_of_tally,
)
from metrics.layout import Shape, build_layout
from metrics.tally import Tally

SHAPE = Shape(num_engines=2, num_api_servers=2, max_model_len=64)
ENGINE_LAYOUT = build_layout(ENGINE, SHAPE)
API_SERVER_LAYOUT = build_layout(API_SERVER, SHAPE)
Book = dict[tuple[str, LabelSet], float]

amounts = st.integers(0, 50)
costly = settings(max_examples=50)  # a book has more than a thousand samples


def play(tallies: tuple[Tally, list[Tally]], engine: int, draw: st.DrawFn) -> None:
    """One engine's honest life, as its tally and those of the API servers count it."""
    mine, servers = tallies

    def draw_amount() -> int:
        return draw(amounts)

    for _ in range(draw(st.integers(0, 4))):  # iterations
        computed, recomputed, generated = draw_amount(), draw_amount(), draw_amount()
        count(mine, "wholebatch:prompt_tokens_computed_total", computed)
        count(mine, "wholebatch:recomputed_tokens_total", recomputed)
        count(mine, "wholebatch:iterations_total", 1, phase=draw(st.sampled_from(["prefill", "decode", "mixed"])))
        observe(mine, "vllm:iteration_tokens_total", computed + recomputed + generated)
        observe(mine, "wholebatch:iteration_scheduled_tokens", computed + recomputed)
        count(mine, "vllm:generation_tokens_total", generated)
        receiver = draw(st.sampled_from([*servers, None]))
        if receiver is None:
            count(mine, "wholebatch:lost_tokens_total", generated, reason="server_lost", api_server="1")
            continue
        num_delivered = draw(st.integers(0, generated))
        count(receiver, "wholebatch:received_tokens_total", generated, engine=str(engine))
        count(receiver, "wholebatch:delivered_tokens_total", num_delivered, engine=str(engine))
        rest = {"engine": str(engine), "reason": "disconnect"}
        count(receiver, "wholebatch:undelivered_tokens_total", generated - num_delivered, **rest)
    for _ in range(draw(st.integers(0, 3))):  # prefills that completed, after one look into the cache
        computed, found = draw_amount(), draw_amount()
        count(mine, "vllm:prompt_tokens_total", computed + found)
        count(mine, "vllm:prompt_tokens_cached_total", found)
        count(mine, "vllm:prompt_tokens_by_source_total", computed, source="local_compute")
        count(mine, "vllm:prompt_tokens_by_source_total", found, source="local_cache_hit")
        hits = found + draw(st.integers(0, 1))
        count(mine, "vllm:prefix_cache_hits_total", hits)
        count(mine, "vllm:prompt_tokens_cached_by_source_total", hits, source="device")
    for server in servers:
        num_accepted, num_lost = draw_amount(), draw(st.integers(0, 2))
        count(server, "wholebatch:sequences_submitted_total", num_accepted + num_lost, engine=str(engine))
        labels = {"engine": str(engine)}
        count(server, "wholebatch:sequences_ended_total", num_accepted, finished_reason="length", **labels)
        count(server, "wholebatch:sequences_ended_total", num_lost, finished_reason="server_lost", **labels)
        count(mine, "wholebatch:sequences_accepted_total", num_accepted)
        count(mine, "wholebatch:sequences_finished_total", num_accepted, finished_reason="stop")
    mine.set(mine.layout.cell("wholebatch:engine_incarnation"), 1.0)


def count(tally: Tally, name: str, amount: int, **labels: str) -> None:
    tally.inc(tally.layout.cell(name, **labels), amount)


def observe(tally: Tally, name: str, value: float) -> None:
    tally.observe(tally.layout.histogram(name), value)


@st.composite
def tallies(draw: st.DrawFn) -> tuple[list[Tally], list[Tally]]:
    engines = [Tally(ENGINE_LAYOUT) for _ in range(SHAPE.num_engines)]
    servers = [Tally(API_SERVER_LAYOUT) for _ in range(SHAPE.num_api_servers)]
    for index, engine in enumerate(engines):
        play((engine, servers), index, draw)
    return engines, servers


def as_book(made: tuple[list[Tally], list[Tally]]) -> Book:
    """What the public port shows: each engine's series, and the API servers' sum."""
    engines, servers = made
    total = np.sum([np.array(server.cells) for server in servers], axis=0)
    book = samples_of_tally(API_SERVER_LAYOUT, total)
    for index, engine in enumerate(engines):
        book |= samples_of_tally(ENGINE_LAYOUT, engine.cells, engine=str(index))
    return book


books = tallies().map(as_book)


def violated(findings: list[Finding]) -> set[str]:
    return {finding.law for finding in findings if finding.status is Status.VIOLATED}


def key(name: str, **labels: str) -> tuple[str, LabelSet]:
    return name, frozenset({"engine": "0", **labels}.items())


# --- the laws ---


def test_every_law_speaks_of_metrics_that_exist_and_has_a_name_that_the_audits_own_metrics_know() -> None:
    names = {metric.name for metric in METRICS}
    for law in LAWS:
        assert law.name in AUDIT_LAWS
        for term in (*law.smaller, *law.greater, *law.gauges):
            assert term.name.removesuffix("_sum").removesuffix("_count") in names
    assert {law.name for law in LAWS} | {"histograms"} == set(AUDIT_LAWS)


@costly
@given(books)
def test_a_balanced_book_passes_every_law_for_every_engine(book: Book) -> None:
    findings = check(book, idle=True)
    assert all(finding.status is Status.HOLDS for finding in findings), audit.format_table(findings)
    assert len(findings) == SHAPE.num_engines * len(LAWS) + 1
    assert not violated(check_running(book, book))


@settings(max_examples=400)
@given(books, st.data())
def test_each_single_imbalance_is_caught_and_by_how_much(book: Book, data: st.DataObject) -> None:
    """Whatever cell of whatever law is wrong: no two errors are needed, and one cannot hide."""
    exact = {t.name for law in LAWS if law.is_exact for t in (*law.smaller, *law.greater)}
    cell = data.draw(st.sampled_from(sorted((k for k in book if k[0] in exact), key=lambda k: (k[0], sorted(k[1])))))
    error = data.draw(st.sampled_from([-1000.0, -1.0, 1.0, 3.0]))
    broken = {**book, cell: book[cell] + error}
    engine = dict(cell[1])["engine"]
    about = [law for law in LAWS if law.is_exact and cell[0] in {t.name for t in (*law.smaller, *law.greater)}]
    findings = {(f.law, f.sentence, f.engine): f for f in check(broken, idle=True)}
    spread = [findings[law.name, law.sentence, engine] for law in about if not is_part_missed(law, cell)]
    assert spread
    assert all(f.status is Status.VIOLATED and f.imbalance == abs(error) for f in spread)


def is_part_missed(law: Law, cell: tuple[str, LabelSet]) -> bool:
    """Whether a law takes only other label values of this metric than the cell's."""
    terms = [t for t in (*law.smaller, *law.greater) if t.name == cell[0]]
    return all(t.values and dict(cell[1])[t.label] not in t.values for t in terms)


@costly
@given(books, st.integers(1, 100))
def test_more_cached_tokens_than_were_found_are_caught(book: Book, missing: int) -> None:
    hits = key("vllm:prefix_cache_hits_total")
    by_tier = key("vllm:prompt_tokens_cached_by_source_total", source="device")
    cached = book[key("vllm:prompt_tokens_by_source_total", source="local_cache_hit")]
    few, many = ({**book, hits: found, by_tier: found} for found in (cached - missing, cached + missing))
    assert "prompt_tokens" in violated(check(few, idle=True))
    assert not violated(check(many, idle=True))  # found, then aborted in prefill
    assert "prompt_tokens" in violated(check({**many, by_tier: cached + missing - 1}, idle=True))


@costly
@given(books)
def test_sequences_that_no_fault_explains_are_caught_while_no_engine_died(book: Book) -> None:
    submitted, ended = key("wholebatch:sequences_submitted_total"), "wholebatch:sequences_ended_total"
    by_length = key(ended, finished_reason="length")
    more = {**book, submitted: book[submitted] + 1000, by_length: book[by_length] + 1000}
    assert "sequences" in violated(check(more, idle=True))
    assert not violated(check({**more, key("wholebatch:engine_incarnation"): 2.0}, idle=True))
    accepted, finished = "wholebatch:sequences_accepted_total", "wholebatch:sequences_finished_total"
    invented = {**book, key(accepted): book[key(accepted)] + 1000}
    stop = key(finished, finished_reason="stop")
    assert "sequences" in violated(check({**invented, stop: book[stop] + 1000}, idle=True))


@costly
@given(books)
def test_what_runs_or_waits_is_accounted_for(book: Book) -> None:
    accepted, running, waiting = (
        key(name)
        for name in ("wholebatch:sequences_accepted_total", "vllm:num_requests_running", "vllm:num_requests_waiting")
    )
    submitted, ended = key("wholebatch:sequences_submitted_total"), key("wholebatch:sequences_ended_total")
    busy = {**book, accepted: book[accepted] + 5, running: 3.0, waiting: 2.0, submitted: book[submitted] + 5}
    busy[key("wholebatch:sequences_ended_total", finished_reason="length")] += 5
    assert ended not in busy
    assert not violated(check(busy, idle=True))
    assert violated(check({**busy, waiting: 1.0}, idle=True)) == {"sequences"}


def test_an_engine_that_nobody_exports_is_not_applicable_rather_than_wrong() -> None:
    book = samples_of_tally(API_SERVER_LAYOUT, [0.0] * API_SERVER_LAYOUT.num_cells)
    findings = check(book, idle=True)
    assert not violated(findings)
    applicable = {f.sentence for f in findings if f.status is Status.HOLDS}
    assert "received tokens are delivered or undelivered for a stated reason" in applicable
    assert "prompt tokens have a source" not in applicable


# --- while running ---


@costly
@given(tallies(), st.data())
def test_a_busy_deployment_that_counts_honestly_violates_nothing(made: tuple, data: st.DataObject) -> None:
    """What was counted downstream by the earlier scrape was counted upstream by the later one."""
    later = as_book(made)
    earlier = dict.fromkeys(later, 0.0)
    assert not violated(check_running(earlier, later))
    upstream = ("wholebatch:sequences_submitted_total", "wholebatch:received_tokens_total")
    ahead = {k: v + data.draw(amounts) if k[0] in upstream else v for k, v in later.items()}
    assert not violated(check_running(later, ahead))


@pytest.mark.parametrize(
    ("name", "labels", "law"),
    [
        ("wholebatch:received_tokens_total", {}, "tokens"),
        ("wholebatch:delivered_tokens_total", {}, "tokens"),
        ("wholebatch:sequences_finished_total", {"finished_reason": "stop"}, "sequences"),
        ("wholebatch:sequences_ended_total", {"finished_reason": "stop"}, "sequences"),
        ("wholebatch:sequences_accepted_total", {}, "sequences"),
        ("vllm:iteration_tokens_total_sum", {}, "iteration_sum"),
        ("wholebatch:recomputed_tokens_total", {}, "iteration_sum"),
        ("wholebatch:iterations_total", {"phase": "mixed"}, "iteration_count"),
        ("vllm:prompt_tokens_total", {}, "prompt_tokens"),
    ],
)
@settings(max_examples=10)
@given(book=books)
def test_more_downstream_than_upstream_is_caught_while_running(
    name: str, labels: dict[str, str], law: str, book: Book
) -> None:
    cell = key(name, **labels)
    assert law in violated(check_running({**book, cell: book[cell] + 1000}, book))


# --- idle ---


@costly
@given(books)
def test_idle_is_when_nothing_was_counted_in_between_and_nothing_is_under_way(book: Book) -> None:
    assert is_idle(book, book)
    for name in ("vllm:num_requests_running", "vllm:num_requests_waiting"):
        assert not is_idle({**book, key(name): 1.0}, book)
        assert not is_idle(book, {**book, key(name): 1.0})
    assert not is_idle(book, {**book, key("wholebatch:api_server_requests_in_flight"): 1.0})
    for name in COUNTERS & {k[0] for k in book}:
        cell = next(k for k in book if k[0] == name)
        assert not is_idle(book, {**book, cell: book[cell] + 1})
        assert not is_idle(book, {k: v for k, v in book.items() if k != cell})
    assert is_idle(book, {**book, key("wholebatch:snapshots_total", result="sent"): 7.0})


def test_a_deployment_with_a_dead_process_is_not_idle_for_its_books_are_still_open() -> None:
    def process(name: str, number: int) -> tuple[str, LabelSet]:
        return name, frozenset({("process", f"api-server-{number}")})

    known: Book = {process("process_cpu_seconds_total", number): 1.0 for number in range(2)}
    alive = {**known, **{process("process_start_time_seconds", number): 5.0 for number in range(2)}}
    dead = {k: v for k, v in alive.items() if k != process("process_start_time_seconds", 1)}
    assert is_idle(alive, alive)
    assert not is_idle(alive, dead)
    assert not is_idle(dead, alive)
    assert not is_idle(dead, dead)


# --- histograms ---


def histogram(buckets: dict[float, float], count: float, total: float, name: str = "h") -> Book:
    book = {key(f"{name}_bucket", le=str(le).replace("inf", "+Inf")): n for le, n in buckets.items()}
    return {**book, key(f"{name}_count"): count, key(f"{name}_sum"): total}


def test_a_right_histogram_passes() -> None:
    assert not violated(check(histogram({1.0: 2, 5.0: 3, math.inf: 4}, 4, 12.0), idle=False))
    assert not violated(check(histogram({1.0: 0, math.inf: 0}, 0, 0.0), idle=False))


@pytest.mark.parametrize(
    ("buckets", "count", "total"),
    [
        ({1.0: 3, 5.0: 2, math.inf: 4}, 4, 12.0),  # falls
        ({1.0: -1, 5.0: 3, math.inf: 4}, 4, 12.0),  # below nothing
        ({1.0: 2, 5.0: 3, math.inf: 4}, 5, 12.0),  # +Inf is not the count
        ({1.0: 2, 5.0: 4}, 4, 12.0),  # no +Inf
        ({1.0: 2, 5.0: 3, math.inf: 3}, 3, 7.1),  # more than 1 + 1 + 5
        ({1.0: 2, 5.0: 3, math.inf: 4}, 4, 5.9),  # less than 0 + 0 + 1 + 5
        ({1.0: 2, 5.0: 3, math.inf: 4}, 4, math.nan),
        ({1.0: math.nan, math.inf: 4}, 4, 4.0),
    ],
)
def test_each_fault_of_a_histogram_is_caught(buckets: dict[float, float], count: float, total: float) -> None:
    assert violated(check(histogram(buckets, count, total), idle=False)) == {"histograms"}


@pytest.mark.parametrize(
    "later",
    [
        histogram({1.0: 1, math.inf: 4}, 4, 5.0),  # a bucket fell
        histogram({1.0: 2, math.inf: 3}, 3, 5.0),  # the count fell
        histogram({1.0: 2, math.inf: 4}, 4, 4.0),  # the sum fell
    ],
)
def test_a_histogram_that_falls_between_two_scrapes_is_caught(later: Book) -> None:
    earlier = histogram({1.0: 2, math.inf: 4}, 4, 5.0)
    assert not violated(check_running(earlier, earlier))
    assert violated(check_running(earlier, later)) == {"histograms"}


# --- samples ---


@costly
@given(tallies())
def test_a_tally_and_its_exposition_give_the_same_samples(made: tuple[list[Tally], list[Tally]]) -> None:
    engine = made[0][0]
    template = Template(ENGINE_LAYOUT, (Scope.ENGINE,), engine=0, model_name="m")
    text = Renderer().render([template.part(np.array(engine.cells), 0.0)]).decode()
    direct = samples_of_tally(ENGINE_LAYOUT, engine.cells, engine="0", model_name="m")
    scraped = audit.parse_samples(text)
    assert {k for k in scraped if k[0] in COUNTERS} == {k for k in direct if k[0] in COUNTERS}
    assert all(direct[k] == value for k, value in scraped.items() if k in direct)
    assert len(scraped.keys() & direct.keys()) > 100


# --- the command ---


class Scraped:
    """A server that answers each scrape with the next of some texts, the last for ever."""

    def __init__(self, *texts: str) -> None:
        self.texts = list(texts)
        self.paths: list[str] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.paths.append(self.path)
                body = (outer.texts.pop(0) if len(outer.texts) > 1 else outer.texts[0]).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture
def serve() -> Iterator[type[Scraped]]:
    servers: list[Scraped] = []

    def start(*texts: str) -> Scraped:
        servers.append(Scraped(*texts))
        return servers[-1]

    yield start  # type: ignore[misc]
    for scraped in servers:
        scraped.server.shutdown()
        scraped.server.server_close()


def text_of(received: int, delivered: int) -> str:
    return (
        f'wholebatch:received_tokens_total{{engine="0"}} {received}\n'
        f'wholebatch:delivered_tokens_total{{engine="0"}} {delivered}\n'
        'wholebatch:undelivered_tokens_total{engine="0",reason="stop"} 0\n'
    )


def test_the_command_prints_a_table_and_ends_with_0_when_every_law_holds(serve, capsys) -> None:
    scraped = serve(text_of(7, 7))
    assert audit.main(["--url", scraped.url, "--interval", "0"]) == 0
    out = capsys.readouterr().out
    assert "is idle" in out
    assert "received_tokens_total 7" in out
    assert "VIOLATED" not in out
    assert scraped.paths == ["/metrics/engines", "/metrics/engines"]


def test_the_command_ends_with_1_and_says_by_how_much_a_law_is_violated(serve, capsys) -> None:
    assert audit.main(["--url", serve(text_of(7, 4)).url, "--interval", "0"]) == 1
    assert "VIOLATED by 3" in capsys.readouterr().out


def test_the_command_waits_for_idleness(serve, capsys) -> None:
    scraped = serve(text_of(7, 4), text_of(8, 5), text_of(8, 8))
    assert audit.main(["--url", scraped.url, "--interval", "0"]) == 0
    assert "is idle" in capsys.readouterr().out


def test_the_command_checks_inequalities_when_the_deployment_stays_busy(serve, capsys) -> None:
    texts = [text_of(number + 3, number) for number in range(3)]
    assert audit.main(["--url", serve(*texts).url, "--interval", "0", "--wait", "0"]) == 0
    assert "inequalities" in capsys.readouterr().out
    texts = [text_of(number, number + 5) for number in range(3)]
    assert audit.main(["--url", serve(*texts).url, "--interval", "0", "--wait", "0"]) == 1


@pytest.mark.parametrize("text", ["<html>hello</html>", "up 1\n", ""])
def test_a_server_that_is_no_deployment_is_one_clear_line_and_exit_code_2(serve, capsys, text: str) -> None:
    url = serve(text).url
    assert audit.main(["--url", url]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    assert url in captured.err


def test_a_deployment_that_exports_no_counters_is_said_to_be_one(serve, capsys) -> None:
    url = serve('wholebatch:exporter_up{engine="0"} 1.0\nvllm:num_requests_running{engine="0"} 0.0\n').url
    assert audit.main(["--url", url]) == 2
    said = capsys.readouterr().err
    assert "--disable-log-stats" in said
    assert "no series" not in said


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "127.0.0.1:1", "ftp://x", "http://", "no such://"])
def test_an_address_that_does_not_answer_is_one_clear_line_and_exit_code_2(capsys, url: str) -> None:
    assert audit.main(["--url", url]) == 2
    captured = capsys.readouterr()
    assert len(captured.err.splitlines()) == 1
    assert url in captured.err


@pytest.mark.parametrize("argv", [[], ["--url"], ["--url", "x", "--wait", "-1"], ["--url", "x", "--interval", "nan"]])
def test_bad_use_ends_with_2(argv: list[str], capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        audit.main(argv)
    assert ended.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


def test_samples_that_are_no_numbers_are_a_violation_not_a_pass() -> None:
    book: Samples = audit.parse_samples(text_of(7, 7).replace(" 7", " NaN"))
    assert violated(check(book, idle=True)) == {"tokens"}
