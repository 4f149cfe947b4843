"""What one API server counts of its own requests, and when that is committed.

Street: truth. Counts go into the server's tally; nothing is handed to a client before the commit that counts it (P4).
"""

from __future__ import annotations

from frontend.counters.group_commit import GroupCommit
from frontend.counters.request_record import (
    OBSERVED_REASONS,
    OTHER,
    REASON_ORDER,
    UNROUTED,
    EndedRequest,
    EngineRecord,
    EngineTimes,
    FinishedSequence,
    HTTPAnswer,
    RequestRecord,
)

__all__ = [
    "OBSERVED_REASONS",
    "OTHER",
    "REASON_ORDER",
    "UNROUTED",
    "EndedRequest",
    "EngineRecord",
    "EngineTimes",
    "FinishedSequence",
    "GroupCommit",
    "HTTPAnswer",
    "RequestRecord",
]
