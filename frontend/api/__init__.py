"""The HTTP APIs: what clients may ask, and what they get.

Street: work. A dialect checks its request, turns it into sequences for an engine, and words what comes back. The order
for each piece (P4): take it, count it, commit, write it.
"""

from __future__ import annotations

from frontend.api.conversations import Conversations
from frontend.api.openai import OpenAIService, routes
from frontend.api.protocol import Terms

__all__ = [
    "Conversations",
    "OpenAIService",
    "Terms",
    "routes",
]
