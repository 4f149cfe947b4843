"""Messages between engines and API servers: what is written is read back, and nothing else is read at all."""

from __future__ import annotations

from dataclasses import fields
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
from engine.wire.codec import MAX_MESSAGE_BYTES, WIRE_VERSION

LONG = "x" * 100_000
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
        constraint=draw(st.none() | st.text(max_size=5)),
        ignore_eos=draw(st.booleans()),
    )


from_api_server = st.one_of(
    st.builds(Hello, counts, counts, counts, counts),
    st.builds(Submit, counts, counts, token_lists, sampling_params(), st.integers(-(2**31), 2**31 - 1)),
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


def inside(row: Any) -> list[Any]:
    return list(row.values()) if isinstance(row, dict) else row


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A right message with one thing in it, at any depth, replaced, dropped or added."""
    whole = msgpack.unpackb(encode(draw(from_api_server | from_engine)))
    row: Any = whole
    while inner := [item for item in inside(row) if isinstance(item, list | dict) and item]:
        if not draw(st.booleans()):
            break
        row = draw(st.sampled_from(inner))
    place = draw(st.sampled_from(list(row) if isinstance(row, dict) else range(len(row))))
    match draw(st.sampled_from(("replace", "drop", "add"))):
        case "replace":
            row[place] = draw(values)
        case "drop":
            del row[place]
        case "add" if isinstance(row, dict):
            row[draw(st.text(max_size=3))] = draw(values)
        case "add":
            row.insert(place, draw(values))
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
    with pytest.raises(WireError, match="kind is none of outputs, goodbye"):
        decode_from_engine(encode(message))


@pytest.mark.parametrize(
    ("message", "complaint"),
    [
        ([WIRE_VERSION + 1, "abort", {}], "wire version"),
        ([True, "abort", {}], "wire version"),
        ([float(WIRE_VERSION), "abort", {}], "wire version"),
        ([WIRE_VERSION, "abort", {"request_ids": [-1]}], r"abort: request_ids\[0\]: .* >= 0, not -1"),
        ([WIRE_VERSION, "abort", {"request_ids": [True]}], "True"),
        ([WIRE_VERSION, "abort", {"request_ids": [1.0]}], r"1\.0"),
        ([WIRE_VERSION, "abort", {"request_ids": [], "why": 1}], r"fields missing or unknown: \['why'\]"),
        ([WIRE_VERSION, "abort", {}], "request_ids"),
        ([WIRE_VERSION, "abort", []], "abort: Expected `object`, got `array`"),
        ([WIRE_VERSION, "abort"], "list of version, kind, fields"),
        ([WIRE_VERSION, "sing", {}], "sing"),
        ([WIRE_VERSION, ["abort"], {}], "abort"),
        ([WIRE_VERSION, "submit", {"request_id": 1}], "engine_incarnation"),
        ([WIRE_VERSION], "list of version, kind, fields"),
        ({"version": WIRE_VERSION}, "list of version, kind, fields"),
    ],
)
def test_a_wrong_message_is_named_in_the_error(message, complaint):
    with pytest.raises(WireError, match=complaint):
        decode_from_api_server(msgpack.packb(message))


@pytest.mark.parametrize(
    "message",
    [
        ("abort", {"request_ids": LONG}),
        ("abort", {"request_ids": [LONG]}),
        ("abort", {"request_ids": [], LONG: 1}),
        ("abort", LONG),
        (LONG, {}),
        (LONG,),
    ],
)
def test_an_error_shows_what_is_wrong_but_not_all_of_it(message):
    with pytest.raises(WireError) as caught:
        decode_from_api_server(msgpack.packb([WIRE_VERSION, *message]))
    assert "xxx" in str(caught.value)
    assert len(str(caught.value)) < 500


BEYOND = {  # of every parameter that has bounds
    "max_tokens": (0, -1, True, 1.5),
    "min_tokens": (-1,),
    "temperature": (-0.1, 2.1, float("nan"), float("inf"), True, "1"),
    "top_p": (0.0, 1.1, float("nan")),
    "top_k": (-1, 2**31),
    "min_p": (-0.1, 1.1, float("nan")),
    "repetition_penalty": (0.0, 0.009, 100.1, float("inf"), float("nan")),
    "presence_penalty": (-2.1, 2.1, float("nan")),
    "frequency_penalty": (-2.1, 2.1, float("nan")),
    "seed": (2**63, 1.5, True),
    "logit_bias": ([[1, 100.1]], [[1, float("nan")]], [[-1, 0.0]], [[1]], [1]),
    "logprobs": (-1, MAX_LOGPROBS + 1, True),
    "stop_token_ids": ([-1], [True], "1"),
    "ignore_eos": (1, None),
    "constraint": (1, "x" * (2**18 + 1)),
}


def test_every_parameter_has_a_value_beyond_its_bounds():
    assert BEYOND.keys() == {field.name for field in fields(SamplingParams)}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name in BEYOND for value in BEYOND[name]])
def test_a_parameter_out_of_range_is_refused_by_name(name, value):
    message = msgpack.unpackb(encode(Submit(1, 1, [1], SamplingParams(max_tokens=1))))
    message[2]["sampling"][name] = value
    with pytest.raises(WireError, match=rf"submit: sampling\.{name}\b"):
        decode_from_api_server(msgpack.packb(message))


def test_fewer_tokens_than_the_least_are_refused():
    message = msgpack.unpackb(encode(Submit(1, 1, [1], SamplingParams(max_tokens=1))))
    message[2]["sampling"]["min_tokens"] = 2
    with pytest.raises(WireError, match="min_tokens 2 is more than max_tokens 1"):
        decode_from_api_server(msgpack.packb(message))


@pytest.mark.parametrize("at", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_no_instant(at):
    with pytest.raises(WireError, match=r"outputs: at: .*not "):
        decode_from_engine(encode(Outputs(1, at, [])))


def outputs_bytes(*rows: Any) -> bytes:
    body = {"engine_incarnation": 1, "at": 1.0, "outputs": list(rows)}
    packed: bytes = msgpack.packb([WIRE_VERSION, "outputs", body])
    return packed


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
    assert decode_from_engine(outputs_bytes(right))
    with pytest.raises(WireError):
        decode_from_engine(outputs_bytes(right, row, right))


def test_as_many_logprobs_as_tokens():
    raw = encode(Outputs(1, 1.0, [Output(1, 3, [5, 6], [TokenLogprobs(-1.0, 1, ())], None, None)]))
    with pytest.raises(WireError, match="differ in length"):
        decode_from_engine(raw)


def test_a_first_token_without_the_start_of_its_sequence_is_refused():
    with pytest.raises(WireError, match="first token without the sequence's start, request_id: 17"):
        decode_from_engine(encode(Outputs(1, 1.0, [Output(17, 0, [5], None, None, None)])))


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
