"""What a scraper asks for beside the path: names, compression, formats."""

from __future__ import annotations

import gzip
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics

from frontend.scrape.request import scrape_request

OPENMETRICS = "application/openmetrics-text"


def registry() -> CollectorRegistry:
    made = CollectorRegistry()
    Counter("requests", "Requests.", ["code"], registry=made).labels(code='2"} x').inc(3)
    Gauge("depth", "Depth\nof the queue.", registry=made).set(2.5)
    Histogram("latency_seconds", "Latency.", ["route"], buckets=(1, 2), registry=made).labels(route="/a b").observe(1.5)
    return made


REGISTRY = registry()
SAMPLES = [sample.name for family in REGISTRY.collect() for sample in family.samples]


@given(names=st.sets(st.sampled_from([*SAMPLES, "nothing", "# HELP"]), min_size=1), is_openmetrics=st.booleans())
def test_named_samples_stay_as_the_client_library_keeps_them(names: set[str], is_openmetrics: bool):
    whole, accept = (generate_openmetrics, OPENMETRICS) if is_openmetrics else (generate_latest, "")
    text = whole(REGISTRY)
    if not is_openmetrics:  # there the library writes `_created` as a family of its own
        names = {name for name in names if not name.endswith("_created")} or {"nothing"}
    expected = whole(Restricted(names))
    assert scrape_request(accept, "", names).body(text) == expected


class Restricted:
    """As the client library's registry restricts a scrape; it could do so only with names it has seen described."""

    def __init__(self, names: set[str]) -> None:
        self._names = names

    def collect(self) -> Iterator[Metric]:
        for family in REGISTRY.collect():
            family.samples = [sample for sample in family.samples if sample.name in self._names]
            if family.samples:
                yield family


def test_the_name_of_a_family_stands_for_all_its_samples():
    text = generate_latest(REGISTRY)
    body = scrape_request("", "", ["latency_seconds"]).body(text).decode()
    assert body.startswith("# HELP latency_seconds Latency.\n# TYPE latency_seconds histogram\n")
    assert body.count("\n") == 2 + 3 + 2  # HELP and TYPE, buckets, count and sum
    assert "_created" not in body


def test_without_names_everything_stays_as_it_is():
    text = generate_latest(REGISTRY)
    assert scrape_request("", "", []).body(text) is text


@pytest.mark.parametrize(
    ("accepted", "is_gzip"),
    [
        ("", False),
        ("identity", False),
        ("gzip", True),
        ("GZIP", True),
        ("br, gzip", True),
        ("deflate, gzip;q=0.5", True),
        ("gzip;q=0", False),
        ("gzip; q=0.000", False),
        ("gzip;q=0.001", True),
        ("x-gzipped", False),
    ],
)
def test_gzip_is_written_only_where_it_is_accepted(accepted: str, is_gzip: bool):
    asked = scrape_request("", accepted, ["depth"])
    assert asked.headers.get("Content-Encoding") == ("gzip" if is_gzip else None)
    body = asked.body(generate_latest(REGISTRY))
    assert (gzip.decompress(body) if is_gzip else body).endswith(b"\ndepth 2.5\n")
