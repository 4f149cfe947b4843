"""The HTTP APIs: what clients may ask, and what they get."""

from __future__ import annotations

from frontend.api.openai import Clients, OpenAIService, add_routes

__all__ = [
    "Clients",
    "OpenAIService",
    "add_routes",
]
