"""One request for each bucket of the latency histograms: what an exemplar is, and its entry in a file. Pure.

An exemplar names a request by an id only: the trace that the client sent it in, or else the id of its answer. Each API
server keeps the newest of its own (`metrics.files.exemplar_store`); of several servers' the newest one is shown, so
that it does not matter who answers (P5). There is one entry a bucket, for as long as a deployment lives (P9).

    offset  0   CRC, of what follows and of which bucket of which layout the entry is
            4   index in LABELS
            5   id, ASCII, padded with zeros
          112   value, time
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Iterable
from typing import Final, NamedTuple

import numpy as np

from metrics.layout import Layout

FAMILIES: Final = (
    "vllm:time_to_first_token_seconds",
    "vllm:inter_token_latency_seconds",
    "vllm:e2e_request_latency_seconds",
)
LABELS: Final = ("trace_id", "request_id")
ID_BYTES: Final = 107  # of an answer's id with a client's in it; an entry fills two cache lines

_CRC: Final = struct.Struct("<I")
_CONTENT: Final = struct.Struct(f"<B{ID_BYTES}sdd")
ENTRY_BYTES: Final = _CRC.size + _CONTENT.size
_UNIX: Final = np.dtype({"names": ["unix"], "formats": ["<f8"], "offsets": [ENTRY_BYTES - 8], "itemsize": ENTRY_BYTES})


class Origin(NamedTuple):
    """The request that an observation was made of."""

    label: str  # one of LABELS
    id: str


class Exemplar(NamedTuple):
    """One observation."""

    unix: float
    value: float
    origin: Origin


class Entries:
    """Which bucket of a layout is where in a file of entries."""

    __slots__ = ("_seed", "cells", "num_bytes")

    def __init__(self, layout: Layout) -> None:
        self.cells = tuple(
            cell
            for series in layout.series
            if series.metric.name in FAMILIES
            for cell in range(series.offset, series.offset + series.num_cells - 1)  # all but the sum
        )
        self.num_bytes = ENTRY_BYTES * len(self.cells)
        self._seed = zlib.crc32(layout.digest)

    def encode(self, cell: int, exemplar: Exemplar) -> bytes:
        """Make the entry of a bucket."""
        label, identity = exemplar.origin
        content = _CONTENT.pack(LABELS.index(label), identity.encode("ascii"), exemplar.value, exemplar.unix)
        return _CRC.pack(zlib.crc32(content, self._seed ^ cell)) + content

    def newest(self, files: Iterable[bytes]) -> dict[int, Exemplar]:
        """Of each bucket, by its cell, the newest exemplar in any of the files; of one instant the first file's. Empty
        entries, torn ones and those of another layout are left out, and files of another size."""
        whole = [raw for raw in files if len(raw) == self.num_bytes]
        times = np.array([np.frombuffer(raw, _UNIX)["unix"] for raw in whole])  # (num_files, num_entries)
        is_written = times > 0
        newest_first = np.argwhere(is_written)[np.argsort(-times[is_written], kind="stable")]
        found: dict[int, Exemplar] = {}
        for file, number in newest_first.tolist():
            cell = self.cells[number]
            if cell not in found:
                exemplar = self._decode(cell, whole[file][number * ENTRY_BYTES : (number + 1) * ENTRY_BYTES])
                if exemplar is not None:
                    found[cell] = exemplar
        return found

    def _decode(self, cell: int, entry: bytes) -> Exemplar | None:
        content = entry[_CRC.size :]
        if zlib.crc32(content, self._seed ^ cell) != _CRC.unpack_from(entry)[0]:
            return None
        label, padded, value, unix = _CONTENT.unpack(content)
        identity = padded.rstrip(b"\0")
        is_sound = label < len(LABELS) and identity.isascii() and 0 <= value < math.inf and 0 < unix < math.inf
        return Exemplar(unix, value, Origin(LABELS[label], identity.decode())) if identity and is_sound else None
