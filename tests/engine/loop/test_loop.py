"""The engine's loop over a real ROUTER, turn by turn, with a model that is none."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zmq

from engine import wire
from engine.host import share
from engine.loop.beacon import Shared
from engine.loop.loop import EngineLoop, bind_router
from engine.loop.process import CannotServeError, load_runner, main, make_core
from engine.schedule.record import Recorder
from engine.wire import STOP_SIGNAL, Abort, Goodbye, Hello, Outputs, SamplingParams, Submit
from engine.wire.deployment import Alive, Facts, Failed, Ready, decode_report
from engine.wire.lifeline import make_lifeline, read_reports
from metrics.bulkhead import Bulkhead
from metrics.catalogue import ENGINE
from metrics.files.store import TallyReader, tally_path
from tests.contexts import OwningContext
from tests.engine.engine_processes import VOCAB_SIZE, SizedRunner, engine_layout, make_config, open_store
from tests.fakes import fake_output

PROMPT = list(range(20, 60))


class Engine:
    """One incarnation, driven by hand."""

    def __init__(self, directory: str, incarnation: int = 1) -> None:
        self.directory = directory
        self.config = make_config(directory, incarnation=incarnation)
        self.store = open_store(directory, incarnation)
        self.runner = SizedRunner()
        self.shared = Shared()
        self.context = OwningContext()
        self.router = bind_router(self.context, wire.work_endpoint(directory, 0, incarnation))
        recorder = Recorder(self.store.tally, self.store.tally.layout, self.config.num_api_servers)
        recorder.close_books()
        bulkhead = Bulkhead(recorder.faulted, logging.getLogger("test"))
        core = make_core(self.config, self.runner, recorder, bulkhead)
        self.loop = EngineLoop(self.config, core, recorder, self.store, self.router, self.shared, bulkhead)

    def connect(self, index: int, incarnation: int = 1) -> ApiServer:
        endpoint = wire.work_endpoint(self.directory, 0, self.config.incarnation)
        return ApiServer(self, index, incarnation, endpoint)

    def count(self, name: str, **labels: str) -> float:
        """As a reader of the file sees it: committed."""
        layout = engine_layout()
        reading = TallyReader(tally_path(self.directory, ENGINE, 0), layout).read()
        return float(reading.cells[layout.cell(name, **labels)])

    def close(self) -> None:
        self.context.destroy(linger=0)
        self.store.close()


class ApiServer:
    def __init__(self, engine: Engine, index: int, incarnation: int, endpoint: str, hwm: int = 1000) -> None:
        self.engine = engine
        self.received = 0
        self.pair = (index, incarnation)
        self.socket = engine.context.socket(zmq.DEALER)
        self.socket.set(zmq.ROUTING_ID, wire.identity(index, incarnation))
        self.socket.set(zmq.LINGER, 0)
        self.socket.set(zmq.RCVHWM, hwm)
        self.socket.connect(endpoint)

    def send(self, *messages: Hello | Submit | Abort | bytes) -> None:
        for message in messages:
            self.socket.send(message if isinstance(message, bytes) else wire.encode(message))

    def hello(self, received: int = 0) -> None:
        index, incarnation = self.pair
        self.send(Hello(index, incarnation, self.engine.config.incarnation, received))

    def submit(self, request_id: int, max_tokens: int = 4) -> None:
        sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
        self.send(Submit(request_id, self.engine.config.incarnation, PROMPT, sampling))

    def receive(self, turns: int = 50) -> Outputs | Goodbye:
        """The next message, with as many turns of the loop as it takes."""
        for _ in range(turns):
            if self.socket.poll(10):
                message = wire.decode_from_engine(self.socket.recv())
                if isinstance(message, Outputs):
                    self.received += sum(len(output.token_ids) for output in message.outputs)
                return message
            self.engine.loop.turn()
        raise AssertionError("no message")

    def tokens(self, number: int) -> list[int]:
        found: list[int] = []
        while len(found) < number:
            message = self.receive()
            assert isinstance(message, Outputs), message
            found += [token for output in message.outputs for token in output.token_ids]
        return found


class _Spy:
    """A ROUTER that tells of every send."""

    def __init__(self, router: zmq.Socket[bytes], on_send: Callable[[], None]) -> None:
        self._router = router
        self._on_send = on_send

    def __getattr__(self, name: str) -> object:
        return getattr(self._router, name)

    def send_multipart(self, *arguments: object) -> None:
        self._on_send()
        self._router.send_multipart(*arguments)  # type: ignore[arg-type]


@pytest.fixture
def directory() -> Iterator[str]:
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as path:
        yield path


@pytest.fixture
def engine(directory: str) -> Iterator[Engine]:
    engine = Engine(directory)
    yield engine
    engine.close()


def turns_until(engine: Engine, name: str, value: float, **labels: str) -> None:
    for _ in range(50):
        if engine.count(name, **labels) == value:
            return
        engine.loop.turn()
    raise AssertionError(f"{name} is {engine.count(name, **labels)}, not {value}")


def test_a_request_gets_its_tokens_and_every_one_is_counted_before_it_is_sent(engine: Engine):
    server = engine.connect(1)
    server.hello()
    server.submit(7)
    expected = fake_output(PROMPT, 4, VOCAB_SIZE)
    for number in range(1, 5):
        message = server.receive()
        assert isinstance(message, Outputs)
        assert message.outputs[0].token_ids == [expected[number - 1]]
        assert engine.count("wholebatch:tokens_sent_total", api_server="1") == number
        assert engine.count("vllm:generation_tokens_total") == number
    assert engine.count("wholebatch:sequences_finished_total", finished_reason="length") == 1
    stages = [engine.count("wholebatch:iteration_stage_seconds_total", stage=s) for s in ("receive", "schedule", "run")]
    assert all(stages)
    assert not engine.shared.is_busy
    assert engine.shared.progress > 0


def test_who_has_not_said_hello_gets_a_goodbye_and_no_work_is_done(engine: Engine):
    server = engine.connect(0)
    server.submit(1)
    message = server.receive()
    assert isinstance(message, Goodbye)
    assert engine.count("wholebatch:sequences_accepted_total") == 0
    server.hello()
    server.submit(1)
    assert server.tokens(4) == fake_output(PROMPT, 4, VOCAB_SIZE)


@pytest.mark.parametrize(
    "raw", [b"", b"\xc1", b"hello", wire.encode(Hello(1, 1, 1, 0)), wire.encode(Hello(9, 1, 1, 0))]
)
def test_what_does_not_parse_or_lies_is_counted_and_dropped(engine: Engine, raw: bytes):
    server = engine.connect(0)
    server.hello()
    server.send(raw)
    turns_until(engine, "wholebatch:wire_rejected_total", 1, kind="from_api_server")
    server.submit(1)
    assert len(server.tokens(4)) == 4


def test_an_aborted_request_is_in_no_later_iteration(engine: Engine):
    server = engine.connect(0)
    server.hello()
    server.submit(1, max_tokens=400)
    server.tokens(2)
    server.send(Abort([1]))
    turns_until(engine, "wholebatch:sequences_finished_total", 1, finished_reason="abort")
    num_batches = len(engine.runner.batches)
    for _ in range(3):
        engine.loop.turn()
    assert len(engine.runner.batches) == num_batches


def test_requests_of_an_ended_api_server_are_aborted_before_the_next_iteration(engine: Engine):
    gone, other = engine.connect(0), engine.connect(1)
    for server in (gone, other):
        server.hello()
        server.submit(1, max_tokens=100)
    gone.tokens(2)
    other.tokens(2)
    engine.shared.ended.put((0, 1))
    engine.loop.turn()
    assert engine.count("wholebatch:sequences_finished_total", finished_reason="abort") == 1
    assert all(len(batch) == 1 for batch in engine.runner.batches[-1:])
    assert len(other.tokens(10)) == 10


def test_last_words_of_an_ended_api_server_start_nothing(engine: Engine):
    gone = engine.connect(0)
    engine.shared.ended.put((0, 1))
    engine.loop.turn()
    gone.hello()
    gone.submit(1)
    assert isinstance(gone.receive(), Goodbye)
    assert engine.count("wholebatch:sequences_accepted_total") == 0


def test_an_api_server_that_is_not_there_any_more_is_lost_with_its_requests(engine: Engine):
    server = engine.connect(0)
    server.hello()
    server.submit(1, max_tokens=400)
    server.tokens(2)
    server.socket.close(linger=0)
    turns_until(engine, "wholebatch:sequences_finished_total", 1, finished_reason="abort")
    assert engine.count("vllm:num_requests_running") == 0


def test_tokens_that_a_dead_api_server_never_received_are_lost_with_the_server(engine: Engine):
    first = engine.connect(0)
    first.hello()
    first.submit(1, max_tokens=400)
    first.tokens(3)
    first.socket.close(linger=0)
    turns_until(engine, "wholebatch:sequences_finished_total", 1, finished_reason="abort")
    sent = engine.count("wholebatch:tokens_sent_total", api_server="0")
    second = engine.connect(0, incarnation=2)
    second.hello(received=3)
    turns_until(engine, "wholebatch:lost_tokens_total", sent - 3, reason="server_lost", api_server="0")
    assert sent >= 3
    second.submit(1)
    assert len(second.tokens(4)) == 4


def test_a_new_engine_closes_the_books_of_the_old_one(directory: str):
    old = Engine(directory)
    server = old.connect(0)
    server.hello()
    server.submit(1, max_tokens=400)
    server.tokens(3)
    old.loop.turn()
    sent = old.count("wholebatch:tokens_sent_total", api_server="0")
    old.close()
    new = Engine(directory, incarnation=2)
    again = new.connect(0)
    again.hello(received=server.received)
    again.submit(1)
    assert len(again.tokens(4)) == 4
    assert new.count("wholebatch:sequences_finished_total", finished_reason="error") == 1
    lost = new.count("wholebatch:lost_tokens_total", reason="engine_lost", api_server="0")
    assert lost == sent - server.received
    assert new.count("wholebatch:tokens_sent_total", api_server="0") == sent + 4
    new.close()


def test_who_takes_no_more_is_given_up_and_told_so_when_there_is_room(directory: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("engine.loop.loop.SEND_HWM", 2)
    engine = Engine(directory)
    engine.router.bind("inproc://direct")  # no buffers of a kernel between the two
    frozen = ApiServer(engine, 0, 1, "inproc://direct", hwm=2)
    frozen.hello()
    frozen.submit(1, max_tokens=400)
    turns_until(engine, "wholebatch:sequences_finished_total", 1, finished_reason="abort")
    engine.loop._housekeeping_at = 0.0
    engine.loop.turn()  # there is no room for a Goodbye yet
    num_batches = len(engine.runner.batches)
    last: Outputs | Goodbye | None = None
    while not isinstance(last, Goodbye):
        engine.loop._housekeeping_at = 0.0
        last = frozen.receive()
    assert len(engine.runner.batches) == num_batches
    sent = engine.count("wholebatch:tokens_sent_total", api_server="0")
    assert 0 < frozen.received < sent
    frozen.hello(frozen.received)
    turns_until(engine, "wholebatch:lost_tokens_total", sent - frozen.received, reason="server_lost", api_server="0")
    frozen.submit(2)
    assert len(frozen.tokens(4)) == 4
    engine.close()


def test_a_second_hello_of_the_same_api_server_ends_what_the_first_had_asked_for(engine: Engine):
    server = engine.connect(0)
    server.hello()
    server.submit(1, max_tokens=400)
    server.tokens(2)
    server.hello(server.received)
    turns_until(engine, "wholebatch:sequences_finished_total", 1, finished_reason="abort")
    assert engine.count("vllm:num_requests_running") == 0


def test_a_hello_meant_for_another_incarnation_is_answered_by_goodbye(engine: Engine):
    server = engine.connect(0)
    server.send(Hello(0, 1, 2, 0))
    assert isinstance(server.receive(), Goodbye)
    server.submit(1)
    assert isinstance(server.receive(), Goodbye)


def test_nothing_is_sent_before_it_was_committed(engine: Engine):
    durable: list[float] = []

    def look() -> None:
        durable.append(engine.count("wholebatch:tokens_sent_total", api_server="0"))

    engine.loop._router = _Spy(engine.router, look)  # type: ignore[assignment]
    server = engine.connect(0)
    server.hello()
    server.submit(1)
    server.tokens(4)
    assert durable == [1, 2, 3, 4]


def test_a_fault_of_the_statistics_harms_no_request_and_is_counted(engine: Engine, monkeypatch: pytest.MonkeyPatch):
    server = engine.connect(0)
    server.hello()
    server.submit(1)

    def full_disk() -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("metrics.files.banks.commit", lambda *_: full_disk())
        assert server.tokens(4) == fake_output(PROMPT, 4, VOCAB_SIZE)
    server.submit(2)
    server.tokens(4)
    assert engine.count("wholebatch:bulkhead_errors_total", where="commit") >= 4
    assert engine.count("vllm:generation_tokens_total") == 8


# --- the process ---


def run_main(directory: str, factory) -> tuple[int, list[object]]:
    """(exit code, reports but those of being alive) of `main` with a configuration as the supervisor gives it."""
    ours, theirs = make_lifeline()
    descriptor = os.memfd_create("config")
    os.write(descriptor, wire.encode(make_config(directory, lifeline_fd=theirs.detach())))
    os.lseek(descriptor, 0, os.SEEK_SET)
    code = main(["--config-fd", str(descriptor)], runner_factory=factory)
    reports, _ = read_reports(ours)
    ours.close()
    return code, [report for report in reports if not isinstance(report, Alive)]


def test_a_model_that_cannot_be_served_is_reported_with_its_line(directory: str):
    def refuse(config, progress):
        raise CannotServeError("/nowhere: no such file or directory")

    code, reports = run_main(directory, refuse)
    assert code == 2
    assert reports == [Failed(message="/nowhere: no such file or directory")]


def test_a_cache_larger_than_memory_is_refused_with_its_line(directory: str, monkeypatch: pytest.MonkeyPatch):
    def reserve(*_: object, **__: object) -> None:
        raise MemoryError("Unable to allocate 9 PiB")

    monkeypatch.setattr("engine.device.runner.TorchRunner.load", reserve)
    code, reports = run_main(directory, load_runner)
    assert code == 2
    assert reports == [Failed(message="/nowhere: not enough memory: Unable to allocate 9 PiB")]


def test_no_room_for_the_tally_is_a_failure_that_may_pass(directory: str):
    code, reports = run_main(f"{directory}/nowhere", lambda *_: SizedRunner())
    assert code == 1
    assert reports == [Failed(message=f"{directory}/nowhere/engine-0.tally: No such file or directory")]


def test_a_process_that_still_loads_reports_and_ends_with_its_supervisor(directory: str, tmp_path):
    ours, theirs = make_lifeline()
    config = tmp_path / "config"
    config.write_bytes(wire.encode(make_config(directory, lifeline_fd=theirs.fileno())))
    program = (
        "import os, sys, time; from engine.loop.process import main;"
        f" sys.exit(main(['--config-fd', str(os.open({str(config)!r}, os.O_RDONLY))],"
        " lambda *_: print('loading', flush=True) or time.sleep(100)))"
    )
    root = Path(__file__).parents[3]
    child = subprocess.Popen(
        [sys.executable, "-c", program], pass_fds=[theirs.fileno()], cwd=root, stdout=subprocess.PIPE, text=True
    )
    theirs.close()
    assert child.stdout is not None
    assert child.stdout.readline() == "loading\n"
    ours.settimeout(30)
    assert decode_report(ours.recv(65536)) == Alive(progress=0, is_busy=False)
    ours.close()
    assert child.wait(20) == 1
    child.stdout.close()


def test_threads_that_the_operator_binds_to_cores_are_as_many_as_the_cores(directory: str, tmp_path):
    config = tmp_path / "config"
    config.write_bytes(wire.encode(make_config(directory)))
    program = (
        "import contextlib, sys; from engine.loop.process import *\n"
        "config = wire.decode_engine_config(open(sys.argv[1], 'rb').read())\n"
        "with contextlib.suppress(CannotServeError): load_runner(config, lambda line: None)\n"
        "import torch; print(torch.get_num_threads())"
    )
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    printed = subprocess.check_output(
        [sys.executable, "-c", program, str(config)],
        cwd=Path(__file__).parents[3],
        env=environment | {"OMP_PROC_BIND": "true"},
    )
    assert int(printed) == share().num_cores


def test_a_missing_model_is_refused_by_the_real_loader(directory: str):
    code, reports = run_main(directory, load_runner)
    assert code == 2
    assert isinstance(reports[-1], Failed)
    assert "/nowhere" in reports[-1].message


def test_the_process_reports_ready_with_its_facts_and_ends_on_sigterm(directory: str, tmp_path):
    ours, theirs = make_lifeline()
    config = tmp_path / "config"
    config.write_bytes(wire.encode(make_config(directory, lifeline_fd=theirs.fileno())))
    program = (
        "import os, sys; from engine.loop.process import main; from tests.engine.engine_processes import SizedRunner;"
        f" sys.exit(main(['--config-fd', str(os.open({str(config)!r}, os.O_RDONLY))], lambda *_: SizedRunner()))"
    )
    root = Path(__file__).parents[3]
    child = subprocess.Popen(
        [sys.executable, "-c", program], pass_fds=[theirs.fileno()], cwd=root, stderr=subprocess.PIPE, text=True
    )
    theirs.close()
    ours.settimeout(30)
    first = decode_report(ours.recv(65536))
    facts = Facts(
        model_name="tiny",
        max_model_len=512,
        vocab_size=VOCAB_SIZE,
        block_size=16,
        num_gpu_blocks=64,
        cache_dtype="float32",
        enable_prefix_caching=True,
    )
    while not isinstance(first, Ready):
        first = decode_report(ours.recv(65536))
    assert first == Ready(facts=facts)
    child.send_signal(STOP_SIGNAL)
    _, said = child.communicate(timeout=20)
    assert child.returncode == 0, said
    assert "Traceback" not in said
    ours.close()
