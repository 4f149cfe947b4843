"""Which id an exemplar has: the client's trace where the header is one, by the specification; else the answer's."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from frontend.context import origin_of

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"


@pytest.mark.parametrize(
    "header",
    [
        f"00-{TRACE}-{PARENT}-01",
        f"00-{TRACE}-{PARENT}-00",  # not sampled
        f" 00-{TRACE}-{PARENT}-01 ",
        f"cc-{TRACE}-{PARENT}-01",
        f"cc-{TRACE}-{PARENT}-01-what-comes-later",
    ],
)
def test_a_trace_is_named(header: str):
    assert origin_of(header, "cmpl-1") == ("trace_id", TRACE)


@pytest.mark.parametrize(
    "header",
    [
        "",
        "a word",
        f"ff-{TRACE}-{PARENT}-01",
        f"00-{TRACE}-{PARENT}-01-more",
        f"00-{TRACE}-{PARENT}",
        f"cc-{TRACE}-{PARENT}-01more",
        f"00-{'0' * 32}-{PARENT}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE.upper()}-{PARENT}-01",
        f"00-{TRACE[1:]}-{PARENT}-01",
        f"00-{TRACE}-{PARENT}-0x",
    ],
)
def test_what_is_no_traceparent_names_no_trace(header: str):
    assert origin_of(header, "cmpl-1") == ("request_id", "cmpl-1")


@given(st.text())
def test_nothing_that_a_client_writes_comes_through_but_a_trace_id(header: str):
    label, identity = origin_of(header, "cmpl-1")
    assert (label, identity) == ("request_id", "cmpl-1") or re.fullmatch("[0-9a-f]{32}", identity)
