"""The numbers that a model's files may state, as a table of bounds, and the values of one file read by it. Pure.

Both readers (`huggingface`, `gguf_checkpoint`) take every number through `Values`, so that whatever a file says in
place of one (a text, a list, NaN, 2**63) is one `ModelError` that names the file, the key and what is allowed. The
bounds are far beyond any model known; they keep sizes from being absurd before anything is allocated.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Any, Final

WHOLE: Final[Mapping[str, tuple[int, int]]] = {  # field -> least, greatest
    "num_layers": (1, 2**12),
    "hidden_size": (1, 2**17),
    "intermediate_size": (1, 2**20),
    "num_heads": (1, 2**12),
    "num_kv_heads": (1, 2**12),
    "head_dim": (2, 2**12),
    "vocab_size": (1, 2**24),
    "max_positions": (2, 2**31),
    "sliding_window": (2, 2**63 - 1),
    "num_experts": (0, 2**16),
    "rope_dimensions": (0, 2**12),
}
REAL: Final[Mapping[str, tuple[float, float]]] = {
    "rms_norm_eps": (1e-30, 1.0),
    "rope_theta": (1.0, 1e30),
    "rope_factor": (1e-6, 1e6),
    "rope_frequency_factor": (1e-6, 1e6),
    "rope_original_positions": (1.0, 2.0**31),
    "partial_rotary_factor": (0.0, 1.0),
}
MAX_TOKEN_ID: Final = 2**31 - 1


class ModelError(ValueError):
    """A model that is missing, broken or unsupported, or a configuration it cannot meet. One line for the operator."""


class Values:
    """What one file says, by key; `source` names the file in errors. Every method raises ModelError."""

    def __init__(self, source: str, values: Mapping[str, Any]) -> None:
        self.source = source
        self._values = values

    def get(self, key: str) -> Any:
        """The value as it stands in the file; None where the file has none."""
        return self._values.get(key)

    def whole(self, field: str, key: str, default: int | None = None) -> int:
        """A whole number for this field of WHOLE; where the file has none, the default, which is checked as well."""
        least, greatest = WHOLE[field]
        value = self._value(key, default)
        if type(value) is not int or not least <= value <= greatest:
            raise self.error(f"{key} is {reprlib.repr(value)}, not a whole number from {least} to {greatest}")
        return value

    def real(self, field: str, key: str, default: float | None = None) -> float:
        """A number for this field of REAL, or the default, which is checked as well."""
        least, greatest = REAL[field]
        value = self._value(key, default)
        if type(value) not in (int, float) or not least <= value <= greatest:  # NaN is neither
            raise self.error(f"{key} is {reprlib.repr(value)}, not a number from {least:g} to {greatest:g}")
        return float(value)

    def text(self, key: str, default: str) -> str:
        """A text, or the default where the file has none."""
        value = self._value(key, default)
        if type(value) is not str:
            raise self.error(f"{key} is {reprlib.repr(value)}, not a text")
        return value

    def inner(self, key: str) -> Values | None:
        """The values of an object within; None where there is none, or an empty one."""
        value = self._values.get(key)
        if value is not None and not isinstance(value, Mapping):
            raise self.error(f"{key} is {reprlib.repr(value)}, not an object")
        return Values(f"{self.source}: {key}", value) if value else None

    def token_ids(self, key: str) -> frozenset[int]:
        """One token id, several, or none."""
        value = self._values.get(key)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if any(type(token) is not int or not 0 <= token <= MAX_TOKEN_ID for token in ids):
            raise self.error(f"{key} is {reprlib.repr(value)}, not a token id or a list of them")
        return frozenset(ids)

    def error(self, what: str) -> ModelError:
        """One line about this file."""
        return ModelError(f"{self.source}: {what}")

    def _value(self, key: str, default: object) -> Any:
        value = self._values.get(key)
        if value is None:
            value = default
        if value is None:
            raise self.error(f"{key} is missing")
        return value
