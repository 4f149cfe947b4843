"""Where a fault of the statistics plane ends: it is counted, logged once a kind, and no request learns of it (P8).

Not for answers to scrapes, which fail one by one (`frontend.app`), nor for the values of a request, which are refused
one by one (`frontend.counters.request_record`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from frontend.counters.request_record import RequestRecord

log = logging.getLogger(__name__)


class Bulkhead:
    """One for each API server."""

    def __init__(self, record: RequestRecord) -> None:
        self._record = record
        self._logged: set[tuple[str, type[Exception]]] = set()

    @contextmanager
    def around(self, where: str) -> Iterator[None]:
        """Whatever is raised inside ends here; `where` is one of metrics.catalogue.metric.BULKHEADS."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - the bulkhead: whatever is wrong with statistics, requests go on
            self.caught(where, error)

    def caught(self, where: str, error: Exception) -> None:
        """Count and, the first time, say it."""
        self._record.fault(where)
        kind = (where, type(error))
        if kind not in self._logged:
            self._logged.add(kind)
            log.error("event=bulkhead where=%s error=%r further=counted_only", where, str(error))
