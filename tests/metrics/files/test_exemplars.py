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
from metrics.files.exemplars import FAMILIES, LABELS, SLOT_BYTES, Exemplar, Origin, Slots
from metrics.layout import Shape, build_layout

LAYOUT = build_layout(API_SERVER, Shape(num_engines=2, num_api_servers=2, max_model_len=100))
OTHER = build_layout(API_SERVER, Shape(num_engines=2, num_api_servers=2, max_model_len=1000))
SLOTS = Slots(LAYOUT)
TRACE = Origin("trace_id", "0af7651916cd43dd8448eb211c80319c")
ANSWER = Origin("request_id", "chatcmpl-0af7651916cd43dd8448eb211c80319c")

origins = st.builds(Origin, st.sampled_from(LABELS), st.text("0123456789abcdef-", min_size=1, max_size=43))
exemplars = st.builds(Exemplar, st.floats(1, 4e9), st.floats(0, 1e9), origins)
views = st.dictionaries(st.sampled_from(SLOTS.cells[:4]), exemplars, max_size=4)


def file_of(cell: int, slot: bytes) -> bytes:
    offset = SLOTS.cells.index(cell) * SLOT_BYTES
    return bytes(offset) + slot + bytes(SLOTS.num_bytes - offset - SLOT_BYTES)


def whole_file(view: dict[int, Exemplar]) -> bytes:
    return b"".join(SLOTS.encode(cell, view[cell]) if cell in view else bytes(SLOT_BYTES) for cell in SLOTS.cells)


def decode(file: bytes) -> dict[int, Exemplar]:
    return SLOTS.newest([file])


@given(st.sampled_from(SLOTS.cells), exemplars)
@example(SLOTS.cells[0], Exemplar(1.5e9, 0.25, ANSWER))
def test_what_is_written_in_a_slot_is_read_from_it(cell: int, exemplar: Exemplar):
    assert decode(file_of(cell, SLOTS.encode(cell, exemplar))) == {cell: exemplar}


@given(st.binary(min_size=SLOT_BYTES, max_size=SLOT_BYTES), st.binary(max_size=3 * SLOT_BYTES))
def test_bytes_that_nobody_wrote_are_no_exemplar(slot: bytes, file: bytes):
    assert decode(slot * len(SLOTS.cells)) == decode(file) == {}


@given(exemplars, exemplars, st.integers(0, SLOT_BYTES))
def test_a_slot_torn_anywhere_is_the_old_one_the_new_one_or_none(old: Exemplar, new: Exemplar, at: int):
    cell = SLOTS.cells[3]
    torn = SLOTS.encode(cell, new)[:at] + SLOTS.encode(cell, old)[at:]
    assert decode(file_of(cell, torn)).get(cell) in (old, new, None)


@pytest.mark.parametrize("bit", range(8 * SLOT_BYTES))
def test_a_flipped_bit_makes_it_none(bit: int):
    cell = SLOTS.cells[0]
    slot = bytearray(SLOTS.encode(cell, Exemplar(1.5e9, 0.25, TRACE)))
    slot[bit // 8] ^= 1 << bit % 8
    assert decode(file_of(cell, bytes(slot))) == {}


def test_a_slot_of_another_bucket_or_layout_is_none():
    first, second, *_ = SLOTS.cells
    slot = SLOTS.encode(first, Exemplar(1.5e9, 0.25, TRACE))
    assert decode(file_of(second, slot)) == {}
    assert Slots(OTHER).newest([file_of(first, slot)]) == {}


@pytest.mark.parametrize("value", [math.nan, math.inf, -0.5])
def test_a_value_that_no_histogram_observes_is_none(value: float):
    cell = SLOTS.cells[0]
    assert decode(file_of(cell, SLOTS.encode(cell, Exemplar(1.5e9, value, TRACE)))) == {}


@given(st.lists(views, min_size=1, max_size=4), st.randoms(use_true_random=False))
def test_of_several_files_the_newest_wins_in_whatever_order(several: list[dict[int, Exemplar]], random: Random):
    times = itertools.count(1)
    several = [{cell: one._replace(unix=float(next(times))) for cell, one in view.items()} for view in several]
    shuffled = random.sample([whole_file(view) for view in several], len(several))
    expected: dict[int, Exemplar] = {}
    for view in several:  # a later view's are newer
        expected |= view
    assert SLOTS.newest(shuffled) == expected
    assert SLOTS.newest([*shuffled, b"", *shuffled]) == expected


def test_behind_a_torn_slot_an_older_one_shows():
    cell = SLOTS.cells[0]
    torn = SLOTS.encode(cell, Exemplar(9e9, 0.25, ANSWER))[:20] + SLOTS.encode(cell, Exemplar(9e9, 0.5, TRACE))[20:]
    older = Exemplar(1.5e9, 0.25, TRACE)
    files = [file_of(cell, torn), file_of(cell, SLOTS.encode(cell, older))]
    assert SLOTS.newest(files) == SLOTS.newest(files[::-1]) == {cell: older}


@given(st.sampled_from(FAMILIES), st.floats(0, 1e5))
@example(FAMILIES[0], 0.001)
@example(FAMILIES[0], 1e5)
def test_an_exemplar_lies_in_its_bucket(tmp_path_factory: pytest.TempPathFactory, family: str, value: float):
    path = str(tmp_path_factory.mktemp("run") / "x")
    histogram = LAYOUT.histogram(family, engine="1")
    store = ExemplarStore(path, LAYOUT, lambda: 7.0)
    store.keep(histogram, value, TRACE)
    store.close()
    [(cell, exemplar)] = read_exemplars([path], SLOTS).items()
    edges = (-math.inf, *histogram.bounds, math.inf)
    bucket = cell - histogram.offset
    assert edges[bucket] < value <= edges[bucket + 1]
    assert exemplar == (7.0, value, TRACE)


def test_a_file_outlives_its_writer_and_keeps_one_size(tmp_path: Path):
    path = exemplars_path(str(tmp_path), API_SERVER, 1)
    assert read_exemplars([path], SLOTS) == {}
    ttft = LAYOUT.histogram(FAMILIES[0], engine="0")
    for incarnation in range(3):
        store = ExemplarStore(path, LAYOUT, lambda now=float(incarnation + 1): now)  # type: ignore[misc]
        store.keep(ttft, 1.0 if incarnation else 0.002, ANSWER)
        store.close()
    assert sorted(read_exemplars([path], SLOTS).values()) == [(1.0, 0.002, ANSWER), (3.0, 1.0, ANSWER)]
    assert [file.name for file in tmp_path.iterdir()] == ["api-server-1.exemplars"]
    assert Path(path).stat().st_size == SLOTS.num_bytes


@pytest.mark.parametrize("found", [b"", b"garbage", b"\xff" * 20_000])
def test_a_file_that_is_none_is_written_over(tmp_path: Path, found: bytes):
    path = tmp_path / "x"
    path.write_bytes(found)
    assert read_exemplars([str(path)], SLOTS) == {}
    store = ExemplarStore(str(path), LAYOUT, lambda: 7.0)
    store.keep(LAYOUT.histogram(FAMILIES[2], engine="0"), 3.0, TRACE)
    store.close()
    assert list(read_exemplars([str(path)], SLOTS).values()) == [(7.0, 3.0, TRACE)]


def test_the_ids_of_answers_and_traces_fit_and_are_short_enough_for_the_format():
    for origin in (TRACE, ANSWER):
        [read] = decode(file_of(SLOTS.cells[0], SLOTS.encode(SLOTS.cells[0], Exemplar(1.0, 1.0, origin)))).values()
        assert read.origin == origin
        assert re.fullmatch("[a-z_]+", origin.label)
        assert len(origin.label) + len(origin.id) <= 128
