"""Where in a JSON text one is, character by character. Pure."""

from __future__ import annotations


class Nesting:
    """How deep in objects and lists, and whether within a string."""

    __slots__ = ("_is_escaped", "depth", "is_in_string")

    def __init__(self) -> None:
        self.depth = 0
        self.is_in_string = False
        self._is_escaped = False

    def follow(self, character: str) -> None:
        """Go on by one character."""
        if self.is_in_string:
            self.is_in_string = self._is_escaped or character != '"'
            self._is_escaped = character == "\\" and not self._is_escaped
        elif character == '"':
            self.is_in_string = True
        else:
            self.depth += (character in "{[") - (character in "}]")
