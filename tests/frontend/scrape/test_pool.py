"""The engines as one, as routers read it: one sample a name, whatever number of engines there is."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from frontend.scrape.pool import Pool, PoolLoad, load_report
from metrics.catalogue import ENGINE
from metrics.exposition import OPENMETRICS, TEXT
from metrics.layout import Shape, build_layout
from metrics.snapshot import Snapshot
from metrics.tally import Tally
from tests.frontend.deployments import FACTS

LAYOUT = build_layout(ENGINE, Shape(num_engines=3, num_api_servers=1, max_model_len=512))
POOL = Pool(LAYOUT, FACTS)


def snapshot(engine: int, running: float, waiting: float, usage: float) -> Snapshot:
    tally = Tally(LAYOUT)
    for name, value in (("num_requests_running", running), ("num_requests_waiting", waiting)):
        tally.set(LAYOUT.cell(f"vllm:{name}"), value)
    tally.set(LAYOUT.cell("vllm:kv_cache_usage_perc"), usage)
    return Snapshot(
        layout_digest=LAYOUT.digest,
        engine=engine,
        incarnation=1,
        sequence=1,
        created_unix=1.0,
        published_unix=1.0,
        grant=None,
        echo=0,
        is_stuck=False,
        cells=np.array(tally.cells, dtype="<f8").tobytes(),
    )


engines = st.lists(st.tuples(st.integers(0, 500), st.integers(0, 500), st.floats(0, 1)), min_size=1, max_size=3)


@given(engines=engines, is_openmetrics=st.booleans())
def test_queues_are_summed_and_cache_use_is_averaged_one_sample_a_name(
    engines: list[tuple[int, int, float]], is_openmetrics: bool
):
    figures = POOL.figures(snapshot(engine, *said) for engine, said in enumerate(engines))
    text = POOL.exposition(figures, OPENMETRICS if is_openmetrics else TEXT).decode()
    families = list((parse_openmetrics if is_openmetrics else parse_text)(text))
    samples = {family.name: family.samples for family in families}
    assert all(len(one) == 1 and family.type == "gauge" for family, one in zip(families, samples.values(), strict=True))
    values = {name: one[0].value for name, one in samples.items()}
    usage = sum(usage for _, _, usage in engines) / len(engines)
    assert values == {
        "vllm:num_requests_running": sum(running for running, _, _ in engines),
        "vllm:num_requests_waiting": sum(waiting for _, waiting, _ in engines),
        "vllm:kv_cache_usage_perc": pytest.approx(usage),
        "vllm:gpu_cache_usage_perc": pytest.approx(usage),
        "vllm:cache_config_info": 1.0,
    }
    labels = samples["vllm:cache_config_info"][0].labels
    assert (labels["block_size"], labels["num_gpu_blocks"]) == ("16", str(64 * len(engines)))
    assert all(not one[0].labels for name, one in samples.items() if name != "vllm:cache_config_info")


def test_where_no_engine_is_heard_there_are_no_series_and_not_zeros():
    assert POOL.figures([]) is None
    assert POOL.exposition(None, TEXT) == b""
    assert POOL.exposition(None, OPENMETRICS) == b"# EOF\n"


def test_a_load_report_has_vllms_two_names_in_the_format_asked_for():
    figures = PoolLoad(num_engines=2, num_running=7.0, num_waiting=3.0, kv_usage=0.25)
    text = "TEXT named_metrics.kv_cache_usage_perc=0.25, named_metrics.num_requests_waiting=3.0"
    assert load_report("TEXT", figures) == load_report(" text", figures) == text
    kind, _, report = str(load_report("JSON", figures)).partition(" ")
    assert (kind, json.loads(report)) == (
        "JSON",
        {"named_metrics": {"kv_cache_usage_perc": 0.25, "num_requests_waiting": 3.0}},
    )
    assert load_report("BIN", figures) is None
