"""Exemplars: any bytes are one or none, the newest wins whoever reads, and each lies in its own bucket."""

from __future__ import annotations

import itertools
import math
import re
from pathlib import Path
from random import Random

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from metrics.catalogue import API_SERVER
from metrics.files.exemplar_store import ExemplarStore, exemplars_path, read_exemplars
from metrics.files.exemplars import ENTRY_BYTES, FAMILIES, LABELS, Entries, Exemplar, Origin
from metrics.layout import Shape, build_layout

LAYOUT = build_layout(API_SERVER, Shape(num_engines=2, num_api_servers=2, max_model_len=100))
OTHER = build_layout(API_SERVER, Shape(num_engines=2, num_api_servers=2, max_model_len=1000))
ENTRIES = Entries(LAYOUT)
TRACE = Origin("trace_id", "0af7651916cd43dd8448eb211c80319c")
ANSWER = Origin("request_id", "chatcmpl-0af7651916cd43dd8448eb211c80319c")

origins = st.builds(Origin, st.sampled_from(LABELS), st.text("0123456789abcdef-", min_size=1, max_size=43))
exemplars = st.builds(Exemplar, st.floats(1, 4e9), st.floats(0, 1e9), origins)
views = st.dictionaries(st.sampled_from(ENTRIES.cells[:4]), exemplars, max_size=4)


def file_of(cell: int, entry: bytes) -> bytes:
    offset = ENTRIES.cells.index(cell) * ENTRY_BYTES
    return bytes(offset) + entry + bytes(ENTRIES.num_bytes - offset - ENTRY_BYTES)


def whole_file(view: dict[int, Exemplar]) -> bytes:
    return b"".join(ENTRIES.encode(cell, view[cell]) if cell in view else bytes(ENTRY_BYTES) for cell in ENTRIES.cells)


def decode(file: bytes) -> dict[int, Exemplar]:
    return ENTRIES.newest([file])


@given(st.sampled_from(ENTRIES.cells), exemplars)
@example(ENTRIES.cells[0], Exemplar(1.5e9, 0.25, ANSWER))
def test_what_is_written_in_a_slot_is_read_from_it(cell: int, exemplar: Exemplar):
    assert decode(file_of(cell, ENTRIES.encode(cell, exemplar))) == {cell: exemplar}


@given(st.binary(min_size=ENTRY_BYTES, max_size=ENTRY_BYTES), st.binary(max_size=3 * ENTRY_BYTES))
def test_bytes_that_nobody_wrote_are_no_exemplar(entry: bytes, file: bytes):
    assert decode(entry * len(ENTRIES.cells)) == decode(file) == {}


@given(exemplars, exemplars, st.integers(0, ENTRY_BYTES))
def test_a_slot_torn_anywhere_is_the_old_one_the_new_one_or_none(old: Exemplar, new: Exemplar, at: int):
    cell = ENTRIES.cells[3]
    torn = ENTRIES.encode(cell, new)[:at] + ENTRIES.encode(cell, old)[at:]
    assert decode(file_of(cell, torn)).get(cell) in (old, new, None)


@pytest.mark.parametrize("bit", range(8 * ENTRY_BYTES))
def test_a_flipped_bit_makes_it_none(bit: int):
    cell = ENTRIES.cells[0]
    entry = bytearray(ENTRIES.encode(cell, Exemplar(1.5e9, 0.25, TRACE)))
    entry[bit // 8] ^= 1 << bit % 8
    assert decode(file_of(cell, bytes(entry))) == {}


def test_a_slot_of_another_bucket_or_layout_is_none():
    first, second, *_ = ENTRIES.cells
    entry = ENTRIES.encode(first, Exemplar(1.5e9, 0.25, TRACE))
    assert decode(file_of(second, entry)) == {}
    assert Entries(OTHER).newest([file_of(first, entry)]) == {}


@pytest.mark.parametrize("value", [math.nan, math.inf, -0.5])
def test_a_value_that_no_histogram_observes_is_none(value: float):
    cell = ENTRIES.cells[0]
    assert decode(file_of(cell, ENTRIES.encode(cell, Exemplar(1.5e9, value, TRACE)))) == {}


@given(st.lists(views, min_size=1, max_size=4), st.randoms(use_true_random=False))
def test_of_several_files_the_newest_wins_in_whatever_order(several: list[dict[int, Exemplar]], random: Random):
    times = itertools.count(1)
    several = [{cell: one._replace(unix=float(next(times))) for cell, one in view.items()} for view in several]
    shuffled = random.sample([whole_file(view) for view in several], len(several))
    expected: dict[int, Exemplar] = {}
    for view in several:  # a later view's are newer
        expected |= view
    assert ENTRIES.newest(shuffled) == expected
    assert ENTRIES.newest([*shuffled, b"", *shuffled]) == expected


def test_behind_a_torn_slot_an_older_one_shows():
    cell = ENTRIES.cells[0]
    torn = ENTRIES.encode(cell, Exemplar(9e9, 0.25, ANSWER))[:20] + ENTRIES.encode(cell, Exemplar(9e9, 0.5, TRACE))[20:]
    older = Exemplar(1.5e9, 0.25, TRACE)
    files = [file_of(cell, torn), file_of(cell, ENTRIES.encode(cell, older))]
    assert ENTRIES.newest(files) == ENTRIES.newest(files[::-1]) == {cell: older}


@given(st.sampled_from(FAMILIES), st.floats(0, 1e5))
@example(FAMILIES[0], 0.001)
@example(FAMILIES[0], 1e5)
def test_an_exemplar_lies_in_its_bucket(tmp_path_factory: pytest.TempPathFactory, family: str, value: float):
    path = str(tmp_path_factory.mktemp("run") / "x")
    histogram = LAYOUT.histogram(family, engine="1")
    store = ExemplarStore(path, LAYOUT, lambda: 7.0)
    store.keep(histogram, value, TRACE)
    store.close()
    [(cell, exemplar)] = read_exemplars([path], ENTRIES).items()
    edges = (-math.inf, *histogram.bounds, math.inf)
    bucket = cell - histogram.offset
    assert edges[bucket] < value <= edges[bucket + 1]
    assert exemplar == (7.0, value, TRACE)


def test_a_file_outlives_its_writer_and_keeps_one_size(tmp_path: Path):
    path = exemplars_path(str(tmp_path), API_SERVER, 1)
    assert read_exemplars([path], ENTRIES) == {}
    ttft = LAYOUT.histogram(FAMILIES[0], engine="0")
    for incarnation in range(3):
        store = ExemplarStore(path, LAYOUT, lambda now=float(incarnation + 1): now)  # type: ignore[misc]
        store.keep(ttft, 1.0 if incarnation else 0.002, ANSWER)
        store.close()
    assert sorted(read_exemplars([path], ENTRIES).values()) == [(1.0, 0.002, ANSWER), (3.0, 1.0, ANSWER)]
    assert [file.name for file in tmp_path.iterdir()] == ["api-server-1.exemplars"]
    assert Path(path).stat().st_size == ENTRIES.num_bytes


@pytest.mark.parametrize("found", [b"", b"garbage", b"\xff" * 20_000])
def test_a_file_that_is_none_is_written_over(tmp_path: Path, found: bytes):
    path = tmp_path / "x"
    path.write_bytes(found)
    assert read_exemplars([str(path)], ENTRIES) == {}
    store = ExemplarStore(str(path), LAYOUT, lambda: 7.0)
    store.keep(LAYOUT.histogram(FAMILIES[2], engine="0"), 3.0, TRACE)
    store.close()
    assert list(read_exemplars([str(path)], ENTRIES).values()) == [(7.0, 3.0, TRACE)]


def test_the_ids_of_answers_and_traces_fit_and_are_short_enough_for_the_format():
    for origin in (TRACE, ANSWER):
        [read] = decode(
            file_of(ENTRIES.cells[0], ENTRIES.encode(ENTRIES.cells[0], Exemplar(1.0, 1.0, origin)))
        ).values()
        assert read.origin == origin
        assert re.fullmatch("[a-z_]+", origin.label)
        assert len(origin.label) + len(origin.id) <= 128
