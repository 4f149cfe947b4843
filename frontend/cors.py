"""Which pages of other origins a browser lets use the API: none, unless the operator names them. Pure.

A browser asks by OPTIONS first, without a key, and obeys the headers of the answer; the key is asked for afterwards.
Source: https://fetch.spec.whatwg.org/#http-cors-protocol
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

ANY: Final = "*"
MAX_AGE_S: Final = 600


@dataclass(frozen=True, slots=True, kw_only=True)
class Cors:
    """What the operator allows, under vLLM's names."""

    origins: tuple[str, ...]
    methods: tuple[str, ...]
    headers: tuple[str, ...]
    allows_credentials: bool

    def of_answer(self, request_headers: Mapping[str, str]) -> dict[str, str]:
        """For any answer to such a page; empty where the browser is to keep it from the page."""
        origin = request_headers.get("Origin")
        if origin is None or not (ANY in self.origins or origin in self.origins):
            return {}
        found = {"Access-Control-Allow-Origin": ANY if ANY in self.origins else origin, "Vary": "Origin"}
        return found | ({"Access-Control-Allow-Credentials": "true"} if self.allows_credentials else {})

    def of_preflight(self, request_headers: Mapping[str, str], methods: str) -> dict[str, str]:
        """For OPTIONS, where the path has these methods; beside what any answer has."""
        if not self.of_answer(request_headers):
            return {}
        asked = request_headers.get("Access-Control-Request-Headers", "")
        found = {
            "Access-Control-Allow-Methods": methods if ANY in self.methods else ", ".join(self.methods),
            # `*` would leave Authorization out
            "Access-Control-Allow-Headers": asked if ANY in self.headers else ", ".join(self.headers),
            "Access-Control-Max-Age": str(MAX_AGE_S),
        }
        return {name: value for name, value in found.items() if value}
