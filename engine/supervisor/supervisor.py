"""The supervisor process: opens sockets, starts children, obeys `engine.supervisor.policy`, publishes the table.

It serves nothing and never loads torch. Children are fresh interpreters; what they need comes by inherited descriptors:
the listening sockets, one end of a lifeline, and a pipe with the configuration, so that no secret is an argument.
"""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import zmq

from engine import wire
from engine.config import DeploymentConfig
from engine.supervisor.auditor import Auditor
from engine.supervisor.directory import DeploymentDirectory
from engine.supervisor.policy import Action, Exit, Key, Kill, Spawn, Supervision
from engine.wire import (
    DEPLOYMENT_TOPIC,
    Deployment,
    EngineConfig,
    ProcessEntry,
    ServerConfig,
    deployment_endpoint,
    encode,
    make_lifeline,
    read_reports,
)
from metrics.broadcast import Publisher
from metrics.catalogue import ENGINE, SUPERVISOR
from metrics.layout import Shape

log = logging.getLogger("engine.supervisor.supervisor")

PUBLISH_S: Final = 0.1
# How long computing threads spin for each other, where the operator's environment does not say. OpenMP's own choice
# lets a process beside the engine stall it. Measured: 2 cores, concurrency 8, output tokens/s on a quiet machine and
# beside one busy process: OpenMP's choice 74 and below 15; 20000 turns 71 and 30; no spinning at all 66 and 44.
COMPUTING: Final = {"GOMP_SPINCOUNT": "20000"}
BACKLOG: Final = 1024


class ListenError(OSError):
    """An address that cannot be listened on; the text names it and says why."""


def listen(host: str, port: int) -> socket.socket:
    """A listening TCP socket; port 0 takes a free one. Raises ListenError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with contextlib.ExitStack() as on_error:
            listening = on_error.enter_context(socket.socket(family, socket.SOCK_STREAM))
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind((host, port))
            listening.listen(BACKLOG)
            on_error.pop_all()
    except (OSError, TypeError) as error:  # TypeError: a host that can be no name
        raise ListenError(f"cannot listen on {host}:{port}: {getattr(error, 'strerror', None) or error}") from error
    return listening


@dataclass(slots=True)
class _Process:
    """A running child and what the supervisor holds of it."""

    popen: subprocess.Popen[bytes]
    pidfd: int
    lifeline: socket.socket


class Supervisor:
    """One deployment's life. `run` returns the exit code."""

    def __init__(self, config: DeploymentConfig, directory: DeploymentDirectory, public: socket.socket) -> None:
        """Raises ListenError when an admin port is taken, StoreError when there is no room for its tally."""
        self._config = config
        self._directory = directory
        self._public = public
        self._admin = _listen_admin(config)
        self._auditor = _make_auditor(config, directory)
        self._machine = Supervision(config.num_engines, config.num_api_servers, config.patience)
        self._processes: dict[Key, _Process] = {}
        self._selector = selectors.DefaultSelector()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._publisher = Publisher(self._context, deployment_endpoint(str(directory.path)))
        self._published = -1
        self._publish_at = 0.0
        self._is_announced = False
        self._exit: Exit | None = None

    def run(self) -> int:
        """Until a signal, or until the deployment cannot go on. The exit's message is on stderr."""
        wakeup, woken = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        before = signal.set_wakeup_fd(woken)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda *_: None)  # the wake-up descriptor tells
        self._selector.register(wakeup, selectors.EVENT_READ, lambda: self._on_signals(wakeup))
        try:
            while self._exit is None:
                for key, _ in self._selector.select(self._wait_s()):
                    key.data()
                if os.getpid() == 1:
                    self._reap_orphans()
                self._obey(self._machine.tick(time.monotonic()))
                self._publish()
                self._auditor.turn(self._machine.table(), time.monotonic())
        finally:
            signal.set_wakeup_fd(before)
            self._close()
        log.info("event=stopped exit_code=%d", self._exit.code)
        if self._exit.message:  # the last line, where people look
            print(f"engine.serve: {' '.join(self._exit.message.split())}", file=sys.stderr)
        return self._exit.code

    def _wait_s(self) -> float:
        return max(0.0, min(self._publish_at - time.monotonic(), PUBLISH_S))

    # --- events ---

    def _on_signals(self, wakeup: int) -> None:
        for _ in os.read(wakeup, 64):
            log.info("event=stopping")
            self._public.close()  # with the API servers' own, so that who connects is refused at once
            self._obey(self._machine.on_signal(time.monotonic()))

    def _on_reports(self, key: Key) -> None:
        process = self._processes.get(key)
        if process is None:
            return
        reports, is_open = read_reports(process.lifeline)
        if not is_open:
            self._selector.unregister(process.lifeline)  # its exit follows, or a kill for its silence
        for report in reports:
            self._obey(self._machine.on_report(*key, report, time.monotonic()))

    def _on_exit(self, key: Key) -> None:
        process = self._processes[key]
        if process.lifeline in self._selector.get_map():
            self._on_reports(key)  # its last words
        self._processes.pop(key)
        code = process.popen.wait()
        self._forget(process)
        if key[0] == ENGINE:
            incarnation = self._incarnation(key)
            Path(wire.work_endpoint(str(self._directory.path), key[1], incarnation).removeprefix("ipc://")).unlink(
                missing_ok=True
            )
        log.info("event=ended role=%s index=%d pid=%d exit_code=%d", *key, process.popen.pid, code)
        self._obey(self._machine.on_exit(*key, time.monotonic()))

    def _incarnation(self, key: Key) -> int:
        entry = self._machine.table().find(*key)
        assert entry is not None, f"no such child: {key}"
        return entry.incarnation

    def _reap_orphans(self) -> None:
        """The first process of a container inherits whoever loses its parent there; unreaped, they use up its pids."""
        own = {process.popen.pid for process in self._processes.values()}
        with contextlib.suppress(ChildProcessError):
            while ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                if ended.si_pid in own:
                    return  # its pidfd tells, and its exit code is wanted
                os.waitpid(ended.si_pid, 0)

    # --- actions ---

    def _obey(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case Spawn():
                    self._spawn(action)
                case Kill():
                    self._kill(action)
                case Exit():
                    self._exit = action
        if actions:
            self._publish()

    def _kill(self, action: Kill) -> None:
        process = self._processes.get((action.role, action.index))
        if process is not None:
            name = signal.Signals(action.signal).name
            log.info("event=signal role=%s index=%d signal=%s why=%r", action.role, action.index, name, action.why)
            process.popen.send_signal(action.signal)

    def _spawn(self, action: Spawn) -> None:
        key = (action.role, action.index)
        try:
            process = self._start(action)
        except OSError as error:  # no process, no descriptor, no memory: the same may pass by the next attempt
            log.error("event=start_failed role=%s index=%d error=%r", *key, str(error))
            self._machine.on_spawned(*key, 0, time.monotonic())
            self._obey(self._machine.on_exit(*key, time.monotonic()))
            return
        self._processes[key] = process
        self._selector.register(process.pidfd, selectors.EVENT_READ, lambda: self._on_exit(key))
        self._selector.register(process.lifeline, selectors.EVENT_READ, lambda: self._on_reports(key))
        self._machine.on_spawned(*key, process.popen.pid, time.monotonic())
        log.info("event=started role=%s index=%d incarnation=%d pid=%d", *key, action.incarnation, process.popen.pid)

    def _start(self, action: Spawn) -> _Process:
        """Raises OSError, and then leaves nothing open or running."""
        with contextlib.ExitStack() as on_error, contextlib.ExitStack() as always:
            ours, theirs = make_lifeline()
            on_error.callback(ours.close)
            always.callback(theirs.close)
            inherited = [theirs.fileno()]
            if action.role == ENGINE:
                module, told = self._config.engine_module, encode(self._engine_config(action, theirs.fileno()))
            else:
                module = self._config.api_server_module
                inherited += [self._public.fileno(), self._admin[action.index].fileno()]
                told = encode(self._server_config(action, theirs.fileno()))
            config_fd = _descriptor(told)
            always.callback(os.close, config_fd)
            command = [sys.executable, "-m", module, "--config-fd", str(config_fd)]
            # A process group of its own: Ctrl-C reaches the supervisor alone, which ends its children in order.
            popen = subprocess.Popen(
                command,
                pass_fds=[*inherited, config_fd],
                stdin=subprocess.DEVNULL,
                process_group=0,
                env={**({} if "OMP_WAIT_POLICY" in os.environ else COMPUTING), **os.environ},
            )
            on_error.callback(popen.wait)
            on_error.callback(popen.kill)
            process = _Process(popen, os.pidfd_open(popen.pid), ours)
            on_error.pop_all()
        return process

    def _engine_config(self, action: Spawn, lifeline_fd: int) -> EngineConfig:
        config = self._config
        return EngineConfig(
            **self._child(action, lifeline_fd),
            cache=config.cache,
            facts=self._machine.facts,
        )

    def _server_config(self, action: Spawn, lifeline_fd: int) -> ServerConfig:
        return ServerConfig(
            **self._child(action, lifeline_fd),
            http=self._config.http,
            chat=self._config.chat,
            port=self._public.getsockname()[1],
            listen_fd=self._public.fileno(),
            admin_fd=self._admin[action.index].fileno(),
            admin_addresses=tuple(s.getsockname()[:2] for s in self._admin),
        )

    def _child(self, action: Spawn, lifeline_fd: int) -> dict[str, Any]:
        """What every child is told: the fields of `ChildConfig`."""
        config = self._config
        return {
            "index": action.index,
            "incarnation": action.incarnation,
            "num_engines": config.num_engines,
            "num_api_servers": config.num_api_servers,
            "directory": str(self._directory.path),
            "lifeline_fd": lifeline_fd,
            "model": config.model,
            "scheduler": config.scheduler,
            "stats": config.stats,
            "patience": config.patience,
        }

    # --- the table ---

    def _publish(self) -> None:
        """On every change, and regularly for whoever has come since."""
        now = time.monotonic()
        if now < self._publish_at and self._machine.version == self._published:
            return
        self._publish_at = now + PUBLISH_S
        self._published = self._machine.version
        self._publisher.publish(DEPLOYMENT_TOPIC, encode(self._table()))
        if self._machine.is_whole and not self._is_announced and not self._machine.is_stopping:
            self._is_announced = True
            self._announce()

    def _table(self) -> Deployment:
        table = self._machine.table()
        state = "stopping" if self._machine.is_stopping else "ready"
        own = ProcessEntry(role=SUPERVISOR, index=0, incarnation=1, pid=os.getpid(), state=state)
        return Deployment(version=table.version, facts=table.facts, processes=(own, *table.processes))

    def _announce(self) -> None:
        host, port = self._public.getsockname()[:2]
        shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
        config = self._config
        line = (
            f"ready url=http://{shown}:{port} model={config.model.served_model_names[0]}"
            f" api_servers={config.num_api_servers} engines={config.num_engines}"
        )
        with contextlib.suppress(OSError, ValueError):  # nobody reads, a full disk, a letter that cannot be written
            print(line, flush=True)

    # --- the end ---

    def _forget(self, process: _Process) -> None:
        for file in (process.pidfd, process.lifeline):
            if file in self._selector.get_map():
                self._selector.unregister(file)
        os.close(process.pidfd)
        process.lifeline.close()

    def _close(self) -> None:
        """Nothing is left running, whatever brought us here."""
        for process in self._processes.values():
            process.popen.kill()
            process.popen.wait()
            self._forget(process)
        self._selector.close()
        self._auditor.close()
        self._publisher.close()
        self._context.destroy(linger=0)
        for listening in (self._public, *self._admin):
            listening.close()
        self._directory.remove()


def _make_auditor(config: DeploymentConfig, directory: DeploymentDirectory) -> Auditor:
    """Open the auditor's files; raises StoreError."""
    shape = Shape(
        num_engines=config.num_engines,
        num_api_servers=config.num_api_servers,
        max_model_len=1,  # not known yet, and nothing in the supervisor's own tally depends on it
        bucket_overrides=config.stats.bucket_overrides,
    )
    return Auditor(str(directory.path), shape, log_stats=config.stats.log_stats)


def _listen_admin(config: DeploymentConfig) -> list[socket.socket]:
    """One socket for each API server; raises ListenError."""
    with contextlib.ExitStack() as undo:
        sockets = []
        for index in range(config.num_api_servers):
            port = config.http.admin_port + index if config.http.admin_port else 0
            sockets.append(undo.enter_context(listen(config.http.admin_host, port)))
        undo.pop_all()
    return sockets


def _descriptor(content: bytes) -> int:
    """What reads as this content. Memory, not a pipe: it holds any length before anybody reads."""
    descriptor = os.memfd_create("config")
    os.write(descriptor, content)
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor
