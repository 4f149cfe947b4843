"""What is known of one HTTP request of a model: handed to whatever runs for it, and looked up nowhere. Pure.

Ids and names only, never a word of a prompt or of an answer. A list of prompts makes several requests of one context.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from metrics.files import Origin

REQUEST_ID_HEADER: Final = "X-Request-ID"
TRACE_HEADERS: Final = ("traceparent", "tracestate")

# Of a client's id for its request: it becomes part of the answer's, of traces and of exemplars.
_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9._:/=+@~-]{1,64}")

# Source: https://www.w3.org/TR/trace-context/#traceparent-header. Version 00 ends with the flags, a later one need not.
_TRACEPARENT: Final = re.compile(
    r"(?!ff)(?P<version>[0-9a-f]{2})-(?!0{32})(?P<trace>[0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(?P<more>-.*)?"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestContext:
    """One HTTP request; `arrived_at` is on `time.monotonic`."""

    operation: str  # what its route does, in OpenTelemetry's words
    model: str
    response_id: str  # the answer's, as the client sees it
    arrived_at: float
    trace_headers: Mapping[str, str]  # those of TRACE_HEADERS that the client sent

    @property
    def origin(self) -> Origin:
        """What an exemplar names: the trace that the client sent the request in, or else the answer."""
        return origin_of(self.trace_headers.get("traceparent", ""), self.response_id)


def is_request_id(text: str) -> bool:
    """Whether a client's id is short and plain enough to be passed on."""
    return _REQUEST_ID.fullmatch(text) is not None


def origin_of(traceparent: str, response_id: str) -> Origin:
    """From the header, empty where there is none, and the id that the client sees in the answer."""
    found = _TRACEPARENT.fullmatch(traceparent.strip())
    if found is None or (found["version"] == "00" and found["more"]):
        return Origin("request_id", response_id)
    return Origin("trace_id", found["trace"])
