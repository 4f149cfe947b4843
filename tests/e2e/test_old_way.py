"""The old way, statistics rebuilt from what API servers get back, distorts; ours does not. Same load, same run."""

from __future__ import annotations

from pathlib import Path

from tests.benchmarks.whole_batch import measure


def test_partial_batches_multiply_the_count_where_whole_iterations_do_not(tiny_model: Path):
    seen = measure(tiny_model, servers=4, num_requests=32)
    assert seen["whole_count"] == seen["logged_iterations"]
    assert seen["whole_sum"] == seen["computed_and_generated"] == seen["partial_sum"]
    assert seen["partial_count"] > 2 * seen["whole_count"]
