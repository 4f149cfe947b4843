"""What is told of each request to those who trace it.

Street: work, watched from its side. A span is made once, at a request's end. OpenTelemetry is an optional package,
imported only when a flag asks for it.
"""

from __future__ import annotations

from frontend.tracing.spans import RequestTrace

__all__ = ["RequestTrace"]
