"""P7, as far as it is no matter of time: what a scrape carries does not grow with API servers, and nothing depends on
whether statistics are kept. What they cost is measured in tests/benchmarks."""

from __future__ import annotations

from pathlib import Path

from tests.e2e.harness import Samples, served
from tests.e2e.load import asks, run

REQUESTS = asks(16, prompt_tokens=(20, 60), max_tokens=16, vocab=250)
OWN = ("process", "api_server")  # labels of figures that are each process's own


def shared_series(samples: Samples) -> set[object]:
    """Those that are not one process's own."""
    return {(name, labels) for name, labels in samples if not any(label in OWN for label, _ in labels)}


def test_a_scrape_has_the_same_series_at_one_and_at_four_api_servers_and_answers_do_not_depend_on_statistics(
    tiny_model: Path,
):
    with served(tiny_model, "--api-server-count", "1") as deployment:
        texts = [seen.text for seen in run(deployment, REQUESTS, at_a_time=4)]
        series = shared_series(deployment.idle_metrics())
    with served(tiny_model, "--api-server-count", "4", "--disable-log-stats") as deployment:
        assert [seen.text for seen in run(deployment, REQUESTS, at_a_time=4)] == texts
        samples = deployment.metrics()
        assert ("vllm:num_requests_running", frozenset({("model_name", tiny_model.name), ("engine", "0")})) in samples
        kept = {name for name, _ in samples if name.endswith(("_total", "_bucket", "_count", "_sum"))}
        assert not {name for name in kept if name.startswith(("vllm:", "wholebatch:"))}
    with served(tiny_model, "--api-server-count", "4") as deployment:
        assert [seen.text for seen in run(deployment, REQUESTS, at_a_time=4)] == texts
        assert shared_series(deployment.idle_metrics()) == series
