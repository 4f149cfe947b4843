"""What a scrape is answered with: whose series may be exported, until when, and in which form.

Street: truth, its last stretch. An engine's series are written only while a lease is held for them (P2), and any API
server gives the same answer (P5).
"""

from __future__ import annotations

from frontend.scrape.discovery import OWN_PATH, PROCESSES_PATH, targets
from frontend.scrape.exporter import Exporter, boottime
from frontend.scrape.pool import Pool, PoolLoad, load_report
from frontend.scrape.request import ScrapeRequest, scrape_request
from frontend.scrape.scrape import Layouts, ScrapeResponder

__all__ = [
    "OWN_PATH",
    "PROCESSES_PATH",
    "Exporter",
    "Layouts",
    "Pool",
    "PoolLoad",
    "ScrapeRequest",
    "ScrapeResponder",
    "boottime",
    "load_report",
    "scrape_request",
    "targets",
]
