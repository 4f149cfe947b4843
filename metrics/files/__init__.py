"""What processes keep in mapped files: tallies, exemplars, held snapshots.

Street: truth. A file has one writer, any number of readers and no lock, and is one size from its start (P9). What is
half written, because its writer was killed, has a wrong checksum and is not read.
"""

from __future__ import annotations

from metrics.files.exemplar_store import ExemplarStore, exemplars_path, read_exemplars
from metrics.files.exemplars import Entries, Exemplar, Origin
from metrics.files.held_snapshots import NOTHING, Held, HeldReader, HeldWriter
from metrics.files.store import StoreError, Tallies, TallyReader, TallyStore, tally_path

__all__ = [
    "NOTHING",
    "Entries",
    "Exemplar",
    "ExemplarStore",
    "Held",
    "HeldReader",
    "HeldWriter",
    "Origin",
    "StoreError",
    "Tallies",
    "TallyReader",
    "TallyStore",
    "exemplars_path",
    "read_exemplars",
    "tally_path",
]
