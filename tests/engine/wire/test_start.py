"""What a child is told at its start: what the supervisor writes is read, everything else is refused by name."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.config import CacheConfig, ChatConfig, HttpConfig, ModelConfig, Patience, SchedulerConfig, StatsConfig
from engine.wire import (
    EngineConfig,
    Facts,
    ServerConfig,
    WireError,
    decode_engine_config,
    decode_server_config,
    encode,
)

whole, positive = st.integers(0, 2**40), st.integers(1, 2**40)
text = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=9)
times = st.floats(1, 1e9)
finite = st.floats(allow_nan=False, allow_infinity=False)
names = st.lists(text, max_size=2).map(tuple)
ports = st.integers(0, 65535)
models = st.builds(
    ModelConfig,
    path=text,
    served_model_names=names,
    dtype=st.sampled_from(("auto", "float32")),
    quantization=st.sampled_from((None, "int8")),
    max_model_len=st.none() | positive,
    seed=whole,
)
caches = st.builds(CacheConfig, block_size=st.integers(1, 1024), kv_cache_memory_bytes=st.none() | positive)
schedulers = st.builds(SchedulerConfig, max_num_seqs=positive, long_prefill_token_threshold=whole)
statistics = st.builds(
    StatsConfig,
    lease_s=times,
    log_stats=st.booleans(),
    custom_buckets=st.lists(st.tuples(text, st.lists(finite, max_size=3).map(tuple)), max_size=2).map(tuple),
    latency_buckets=st.sampled_from(("standard", "fine")),
    otlp_traces_endpoint=st.none() | text,
)
facts = st.builds(
    Facts,
    model_name=st.text(st.characters(exclude_categories=["Cs"])),
    max_model_len=whole,
    vocab_size=whole,
    block_size=whole,
    num_gpu_blocks=whole,
    cache_dtype=text,
    enable_prefix_caching=st.booleans(),
)
patiences = st.builds(Patience, drain_timeout_s=times, freeze_timeout_s=times, stall_timeout_s=times)
https = st.builds(HttpConfig, host=text, port=ports, api_keys=names, max_num_queued_reqs=st.none() | positive)
CHILD: dict[str, Any] = {
    "index": 0,
    "incarnation": 1,
    "num_engines": 2,
    "num_api_servers": 1,
    "directory": "/run/x",
    "lifeline_fd": 5,
    "model": ModelConfig(path="/models/tiny"),
    "scheduler": SchedulerConfig(),
    "stats": StatsConfig(custom_buckets=(("itl", (0.1, 0.2)),)),
    "patience": Patience(),
}
ENGINE = EngineConfig(**CHILD, cache=CacheConfig(), facts=None)
SERVER = ServerConfig(
    **CHILD,
    http=HttpConfig(api_keys=("secret",)),
    chat=ChatConfig(),
    port=8000,
    listen_fd=6,
    admin_fd=7,
    admin_addresses=(("127.0.0.1", 9000),),
)


@given(models, caches, schedulers, statistics, patiences, st.none() | facts)
def test_an_engines_configuration_is_read_as_it_was_written(model, cache, scheduler, stats, patience, found):
    config = replace(ENGINE, model=model, cache=cache, scheduler=scheduler, stats=stats, patience=patience, facts=found)
    assert decode_engine_config(encode(config)) == config


@given(models, statistics, patiences, https, st.lists(st.tuples(text, ports), min_size=1, max_size=3).map(tuple))
def test_an_api_servers_configuration_is_read_as_it_was_written(model, stats, patience, http, addresses):
    config = replace(
        SERVER,
        model=model,
        stats=stats,
        patience=patience,
        http=http,
        chat=ChatConfig(),
        num_api_servers=len(addresses),
        admin_addresses=addresses,
    )
    assert decode_server_config(encode(config)) == config


def sent(config: object, place: str, value: object) -> bytes:
    """The configuration's bytes with one field, `section.field` or `field`, replaced or added."""
    message = msgpack.unpackb(encode(config))
    *sections, name = place.split(".")
    row = message[2]
    for section in sections:
        row = row[section]
    row[name] = value
    packed: bytes = msgpack.packb(message)
    return packed


OF_EVERY_CHILD: list[tuple[str, object]] = [
    ("index", -1),
    ("index", True),
    ("index", 1.0),
    ("incarnation", None),
    ("num_engines", 0),
    ("num_api_servers", "1"),
    ("directory", ""),
    ("directory", "/run/\0x"),
    ("lifeline_fd", -1),
    ("model", None),
    ("model.path", ""),
    ("model.dtype", "int3"),
    ("model.max_model_len", 0),
    ("model.seed", -1),
    ("stats.lease_s", "0.6"),
    ("stats.lease_s", float("inf")),
    ("stats.publish_interval_s", float("nan")),
    ("stats.publish_interval_s", 0.001),
    ("stats.log_stats", 1),
    ("stats.custom_buckets", [["itl", ["x"]]]),
    ("stats.otlp_traces_endpoint", ""),
    ("stats.otlp_traces_endpoint", ["http://h"]),
    ("patience.drain_timeout_s", -0.5),
    ("patience.freeze_timeout_s", 0.5),
    ("patience.stall_timeout_s", False),
    ("surprise", 1),
    ("stats.surprise", 1),
]
OF_ENGINES: list[tuple[str, object]] = [
    ("cache.block_size", 1025),
    ("cache.kv_cache_memory_bytes", 0),
    ("scheduler.max_num_seqs", 0),
    ("scheduler.long_prefill_token_threshold", -1),
    ("facts", {"model_name": "m"}),
]
OF_SERVERS: list[tuple[str, object]] = [
    ("http.port", 65536),
    ("http.max_num_queued_reqs", -1),
    ("http.max_num_seqs_per_request", 0),
    ("http.max_num_queued_tokens", "9"),
    ("http.api_keys", [1]),
    ("port", -1),
    ("listen_fd", None),
    ("admin_addresses", []),
    ("admin_addresses", [["a"]]),
    ("admin_addresses", [["a", 65536]]),
]


@pytest.mark.parametrize(("place", "value"), OF_EVERY_CHILD + OF_ENGINES)
def test_what_an_engine_would_not_be_told_is_refused_by_name(place: str, value: object):
    with pytest.raises(WireError, match=place.rpartition(".")[2]):
        decode_engine_config(sent(ENGINE, place, value))


@pytest.mark.parametrize(("place", "value"), OF_EVERY_CHILD + OF_SERVERS)
def test_what_an_api_server_would_not_be_told_is_refused_by_name(place: str, value: object):
    with pytest.raises(WireError, match=place.rpartition(".")[2]):
        decode_server_config(sent(SERVER, place, value))


@pytest.mark.parametrize("name", [field.name for field in fields(StatsConfig)])
def test_a_field_that_is_missing_is_refused_by_name_though_it_has_a_default(name: str):
    message = msgpack.unpackb(encode(SERVER))
    del message[2]["stats"][name]
    with pytest.raises(WireError, match=name):
        decode_server_config(msgpack.packb(message))


@pytest.mark.parametrize("raw", [b"", b"{}", b"[]", b"null", encode(ENGINE), encode(SERVER)[:-1]])
def test_what_is_no_configuration_of_an_api_server_is_refused(raw: bytes):
    with pytest.raises(WireError):
        decode_server_config(raw)


def test_a_key_is_not_shown_with_its_configuration():
    assert "secret" not in repr(SERVER)


def test_every_child_makes_the_same_shape_of_the_operators_choice():
    assert ENGINE.shape(128) == SERVER.shape(128)
    assert SERVER.shape(128).bucket_overrides == (("itl", (0.1, 0.2)),)


@pytest.mark.parametrize("place", ["http", "model", "surprise"])
def test_a_complaint_about_a_whole_does_not_show_what_it_holds(place: str):
    with pytest.raises(WireError) as refused:
        decode_server_config(sent(SERVER, place, {"api_keys": ["secret"]}))
    assert "secret" not in str(refused.value)
