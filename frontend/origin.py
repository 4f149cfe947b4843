"""Which request an exemplar names: by the trace that its client sent it in, or else by its answer's id.

Ids only, never a word of a prompt or of an answer. The route says it once, and whatever runs for that HTTP request
(`contextvars`) finds it: a list of prompts makes several requests of one origin.
"""

from __future__ import annotations

import re
from contextvars import ContextVar
from typing import Final

from metrics.files import Origin

ORIGIN: Final[ContextVar[Origin | None]] = ContextVar("origin", default=None)

# Source: https://www.w3.org/TR/trace-context/#traceparent-header. Version 00 ends with the flags, a later one need not.
_TRACEPARENT: Final = re.compile(
    r"(?!ff)(?P<version>[0-9a-f]{2})-(?!0{32})(?P<trace>[0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(?P<more>-.*)?"
)


def origin_of(traceparent: str, response_id: str) -> Origin:
    """From the header, empty where there is none, and the id that the client sees in the answer."""
    found = _TRACEPARENT.fullmatch(traceparent.strip())
    if found is None or (found["version"] == "00" and found["more"]):
        return Origin("request_id", response_id)
    return Origin("trace_id", found["trace"])
