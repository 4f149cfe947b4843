"""What is told of each request to those who trace it."""

from __future__ import annotations

from frontend.tracing.spans import TracedClients, describe, middleware

__all__ = [
    "TracedClients",
    "describe",
    "middleware",
]
