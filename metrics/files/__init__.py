"""What processes keep in mapped files: tallies, exemplars, held snapshots."""

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
