"""Messages between engines and API servers: what is written is read back, and nothing else is read at all."""

from __future__ import annotations

from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.wire import (
    FINISH_REASONS,
    MAX_LOGPROBS,
    Abort,
    Finish,
    Goodbye,
    Hello,
    Output,
    Outputs,
    SamplingParams,
    Start,
    Submit,
    TokenLogprobs,
    WireError,
    decode_from_api_server,
    decode_from_engine,
    encode,
    identity,
    parse_identity,
    work_endpoint,
)
from engine.wire.messages import MAX_MESSAGE_BYTES, WIRE_VERSION

counts = st.integers(0, 2**63)
token_lists = st.lists(st.integers(0, 200_000), max_size=8)
finite = st.floats(allow_nan=False, allow_infinity=False)
instants = st.floats(0, 1e9)


@st.composite
def sampling_params(draw: st.DrawFn) -> SamplingParams:
    max_tokens = draw(st.integers(1, 2**31))
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=draw(st.integers(0, min(max_tokens, 100))),
        temperature=draw(st.floats(0, 2)),
        top_p=draw(st.floats(0, 1, exclude_min=True)),
        top_k=draw(st.integers(0, 1000)),
        min_p=draw(st.floats(0, 1)),
        repetition_penalty=draw(st.floats(0.01, 10)),
        presence_penalty=draw(st.floats(-2, 2)),
        frequency_penalty=draw(st.floats(-2, 2)),
        seed=draw(st.none() | st.integers(-(2**63), 2**63 - 1)),
        logit_bias=tuple(draw(st.lists(st.tuples(st.integers(0, 1000), st.floats(-100, 100)), max_size=3))),
        logprobs=draw(st.none() | st.integers(0, MAX_LOGPROBS)),
        stop_token_ids=tuple(draw(token_lists)),
        ignore_eos=draw(st.booleans()),
    )


from_api_server = st.one_of(
    st.builds(Hello, counts, counts, counts, counts),
    st.builds(Submit, counts, counts, token_lists, sampling_params(), st.integers(-(2**31), 2**31)),
    st.builds(Abort, st.lists(counts, max_size=5)),
)
finishes = st.builds(
    Finish,
    reason=st.sampled_from(FINISH_REASONS),
    stop_token_id=st.none() | counts,
    message=st.none() | st.text(max_size=20),
)
starts = st.builds(Start, instants, instants, counts, counts)
logprobs = st.builds(TokenLogprobs, finite, counts, st.lists(st.tuples(counts, finite), max_size=3).map(tuple))


@st.composite
def outputs(draw: st.DrawFn) -> Output:
    tokens = draw(token_lists)
    rows = draw(st.none() | st.lists(logprobs, min_size=len(tokens), max_size=len(tokens)))
    first_index = draw(counts)
    start = draw(starts if tokens and first_index == 0 else st.none() | starts)
    return Output(draw(counts), first_index, tokens, rows, draw(st.none() | finishes), start)


one_token = st.lists(st.integers(0, 200_000), min_size=1, max_size=1)
later_tokens = st.builds(Output, counts, st.integers(1, 300), one_token, *[st.none()] * 3)  # the usual ones

from_engine = st.one_of(
    st.builds(Outputs, counts, instants, st.lists(outputs() | later_tokens, max_size=3)),
    st.builds(Goodbye, counts, st.text(max_size=20)),
)

# Anything MessagePack can say, and messages that are wrong in one place only.
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=5)
    | st.binary(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A right message with one thing in it, at any depth, replaced, dropped or added."""
    whole = msgpack.unpackb(encode(draw(from_api_server | from_engine)))
    row: list[Any] = whole
    while inner := [item for item in row if isinstance(item, list) and item]:
        if not draw(st.booleans()):
            break
        row = draw(st.sampled_from(inner))
    index = draw(st.integers(0, len(row) - 1))
    match draw(st.sampled_from(("replace", "drop", "add"))):
        case "replace":
            row[index] = draw(values)
        case "drop":
            del row[index]
        case "add":
            row.insert(index, draw(values))
    packed: bytes = msgpack.packb(whole)
    return packed


@given(message=from_api_server)
def test_what_an_api_server_says_is_read_back_as_it_was(message):
    assert decode_from_api_server(encode(message)) == message


@given(message=from_engine)
def test_what_an_engine_says_is_read_back_as_it_was(message):
    assert decode_from_engine(encode(message)) == message


@given(raw=st.binary(max_size=60) | values.map(msgpack.packb) | damaged())
def test_any_bytes_are_a_message_or_a_wire_error(raw):
    for decode in (decode_from_api_server, decode_from_engine):
        try:
            message = decode(raw)
        except WireError:
            continue
        assert decode(encode(message)) == message


@given(message=from_api_server, cut=st.floats(0, 1, exclude_max=True))
def test_a_message_that_was_cut_is_refused(message, cut):
    raw = encode(message)
    with pytest.raises(WireError):
        decode_from_api_server(raw[: int(cut * len(raw))])


@given(message=from_api_server)
def test_nobody_reads_the_other_direction(message):
    with pytest.raises(WireError, match="no message of an engine"):
        decode_from_engine(encode(message))


@pytest.mark.parametrize(
    ("message", "complaint"),
    [
        ([WIRE_VERSION + 1, "abort", []], "wire version"),
        ([True, "abort", []], "wire version"),
        ([float(WIRE_VERSION), "abort", []], "wire version"),
        ([WIRE_VERSION, "abort", [-1]], "-1"),
        ([WIRE_VERSION, "abort", [True]], "True"),
        ([WIRE_VERSION, "abort", [1.0]], r"1\.0"),
        ([WIRE_VERSION, "abort"], "no message"),
        ([WIRE_VERSION, "sing", []], "sing"),
        ([WIRE_VERSION], "list of version, kind, fields"),
        ({"version": WIRE_VERSION}, "list of version, kind, fields"),
        ([WIRE_VERSION, "hello", 0, 1, 1, "many"], "received_tokens is not a whole number from 0: 'many'"),
    ],
)
def test_a_wrong_message_is_named_in_the_error(message, complaint):
    with pytest.raises(WireError, match=complaint):
        decode_from_api_server(msgpack.packb(message))


def test_an_error_shows_what_is_wrong_but_not_all_of_it():
    with pytest.raises(WireError) as caught:
        decode_from_api_server(msgpack.packb([WIRE_VERSION, "abort", "x" * 100_000]))
    assert "xxx" in str(caught.value)
    assert len(str(caught.value)) < 300


def test_a_parameter_out_of_range_is_refused_with_its_value():
    raw = encode(Submit(1, 1, [1], SamplingParams(max_tokens=1, temperature=-3.0)))
    with pytest.raises(WireError, match=r"temperature is out of range: -3\.0"):
        decode_from_api_server(raw)


def test_not_a_number_is_no_instant():
    with pytest.raises(WireError, match="at is not finite"):
        decode_from_engine(encode(Outputs(1, float("nan"), [])))


@pytest.mark.parametrize(
    "row",
    [
        [-1, 1, [5], None, None, None],
        [True, 1, [5], None, None, None],
        [1, -1, [5], None, None, None],
        [1, 0, [5], None, None, None],
        [1, 1.0, [5], None, None, None],
        [1, 1, [-5], None, None, None],
        [1, 1, [5.0], None, None, None],
        [1, 1, [True], None, None, None],
        [1, 1, [5, -6], None, None, None],
        [1, 1, "5", None, None, None],
        [1, 1, b"\x05", None, None, None],
        [1, 1, [5], [], None, None],
        [1, 1, [5], None, "stop", None],
        [1, 1, [5], None, None, [1.0, 2.0, 3]],
        [1, 1, [5], None, None],
        [1, 1, [5], None, None, None, None],
        {"request_id": 1},
    ],
)
def test_an_output_that_is_nearly_a_later_token_is_refused(row):
    right = [1, 1, [5], None, None, None]
    assert decode_from_engine(msgpack.packb([WIRE_VERSION, "outputs", 1, 1.0, [right]]))
    with pytest.raises(WireError):
        decode_from_engine(msgpack.packb([WIRE_VERSION, "outputs", 1, 1.0, [right, row, right]]))


def test_as_many_logprobs_as_tokens():
    raw = encode(Outputs(1, 1.0, [Output(1, 3, [5, 6], [TokenLogprobs(-1.0, 1, ())], None)]))
    with pytest.raises(WireError, match="differ in length"):
        decode_from_engine(raw)


def test_a_first_token_without_the_start_of_its_sequence_is_refused():
    with pytest.raises(WireError, match="first token without the sequence's start, request_id: 17"):
        decode_from_engine(encode(Outputs(1, 1.0, [Output(17, 0, [5], None, None)])))


def test_a_message_longer_than_the_limit_is_not_even_unpacked():
    with pytest.raises(WireError, match="too long"):
        decode_from_api_server(b"\x00" * (MAX_MESSAGE_BYTES + 1))


@given(api_server=st.integers(0, 10_000), incarnation=st.integers(0, 10_000))
def test_an_identity_is_read_back(api_server, incarnation):
    assert parse_identity(identity(api_server, incarnation)) == (api_server, incarnation)


@given(
    raw=st.binary(max_size=30)
    | st.sampled_from(
        (b"1.", b".1", b"1.2.3", b"-1.2", b" 1.2", b"1_0.2", b"01.2", b"9" * 5000 + b".1", "²".encode() + b".1")
    )
)
def test_any_identity_parses_or_raises_wire_error(raw):
    try:
        api_server, incarnation = parse_identity(raw)
    except WireError:
        return
    assert identity(api_server, incarnation) == raw


def test_every_engine_incarnation_has_an_endpoint_of_its_own():
    assert work_endpoint("/d", 1, 2) != work_endpoint("/d", 1, 3)
