"""What can happen to the processes of a deployment: killed, frozen, restarted; and when it is whole again."""

from __future__ import annotations

import http.client
import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from engine.wire import STOP_SIGNAL
from tests.e2e.harness import Served, wait_for

REFUSED = (OSError, http.client.HTTPException)  # the API server that took the connection ended


class Faults:
    """Acts on one deployment by pid."""

    def __init__(self, served: Served) -> None:
        self._served = served

    # --- who ---

    def row(self, role: str, index: int) -> dict[str, Any]:
        """Its line of the deployment table."""
        rows = self.table()["processes"]
        found: dict[str, Any] = next(p for p in rows if p["role"] == role and p["index"] == index)
        return found

    def table(self) -> dict[str, Any]:
        """From whichever API server answers; one that ends meanwhile is asked again."""

        def ask() -> dict[str, Any] | None:
            with suppress(*REFUSED):
                return self._served.deployment()
            return None

        table: dict[str, Any] = wait_for(ask, "an answer")
        return table

    def exporter(self, engine: int = 0) -> int:
        """The index of the API server that exports the engine's series."""

        def granted() -> list[int]:
            grants = [e["grant"] for e in self.table()["exporters"] if e["engine"] == engine]
            return [grant["api_server"] for grant in grants if grant is not None]

        index: int = wait_for(granted, "an exporter")[0]
        return index

    def another(self, engine: int = 0) -> int:
        """The index of an API server that is no exporter of that engine: the last such one."""
        exporter = self.exporter(engine)
        servers: list[int] = [p["index"] for p in self.table()["processes"] if p["role"] == "api-server"]
        return max(index for index in servers if index != exporter)

    # --- what ---

    def kill(self, role: str, index: int) -> None:
        """SIGKILL, and wait until its next incarnation is ready."""
        self.end([(role, index)], signal.SIGKILL)

    def restart(self, role: str, index: int) -> None:
        """The supervisor's own signal, which drains, and wait until its next incarnation is ready."""
        self.end([(role, index)], STOP_SIGNAL)

    def restart_all(self) -> None:
        """All API servers, one after another."""
        for index in range(len(self._served.pids("api-server"))):
            self.restart("api-server", index)

    def freeze(self, role: str, index: int, seconds: float) -> None:
        """SIGSTOP for so long: the fault itself is a length of time."""
        pid = self._served.process.pid if role == "supervisor" else self.row(role, index)["pid"]
        with frozen(pid):
            time.sleep(seconds)

    def settle(self, timeout_s: float = 120.0) -> None:
        """Wait until every process is ready."""
        wait_for(lambda: all(p["state"] == "ready" for p in self.table()["processes"]), "every process", timeout_s)

    def end(self, processes: Sequence[tuple[str, int]], number: signal.Signals) -> None:
        """Signal these (role, index) at once, and wait until the next incarnation of each is ready."""
        before = {process: self.row(*process) for process in processes}
        for row in before.values():
            with suppress(ProcessLookupError):
                os.kill(row["pid"], number)

        def are_back() -> bool:
            rows = {process: self.row(*process) for process in processes}
            return all(
                row["state"] == "ready" and row["incarnation"] > before[process]["incarnation"]
                for process, row in rows.items()
            )

        wait_for(are_back, f"the next incarnations of {list(processes)}", 120.0)


@contextmanager
def frozen(pid: int) -> Iterator[None]:
    """Stopped while inside; it goes on however that ends. One that is no more is left alone."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
