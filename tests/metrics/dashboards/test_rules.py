"""The rule file, as Prometheus' own tool reads it: every alert fires when it should and is silent when it should be."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from metrics.catalogue import BUCKETS
from metrics.dashboards.generate import ROOT
from metrics.dashboards.promql import metrics_in
from metrics.dashboards.rules import SERVICE_LEVELS, alerts, recording_rules, rule_file

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="no `promtool`: install Debian's package prometheus"
)

OF_MODEL = 'job="wb",model_name="m"'
INSTANCE = 'instance="a:8000"'
OF_ENGINE = f'{OF_MODEL},engine="0",{INSTANCE}'
# One engine 0 each of two deployments, scraped either way.
TWO_DEPLOYMENTS = {
    "static": ("a:8000", "b:8000"),
    "discovered": ("a:8000/engine-0", "b:8000/engine-0"),
}


def series(name: str, labels: str, values: str) -> dict[str, str]:
    return {"series": f"{name}{{{labels}}}", "values": values}


def latency(name: str, bound: str, fast: str, every: str) -> list[dict[str, str]]:
    """A histogram of which only the bucket of the service level matters."""
    return [
        series(f"{name}_bucket", f'{OF_ENGINE},le="{bound}"', fast),
        series(f"{name}_bucket", f'{OF_ENGINE},le="+Inf"', every),
        series(f"{name}_count", OF_ENGINE, every),
    ]


TTFT, ITL = "vllm:time_to_first_token_seconds", "vllm:inter_token_latency_seconds"
UP, WAITING = "wholebatch:exporter_up", "vllm:num_requests_waiting"
RECOMPUTED, SCHEDULED = "wholebatch:recomputed_tokens_total", "wholebatch:iteration_scheduled_tokens_sum"
PREEMPTIONS = "vllm:num_preemptions_total"
RESTARTS = "wholebatch:engine_incarnation"
STARTS = "wholebatch:api_server_starts_total"
OF_SERVER = f'job="wb",process="supervisor-0",api_server="0",{INSTANCE}'

# Alert -> (when it fires, minutes), (the same, but well): series by the minute.
FIRES: Mapping[str, tuple[int, list[dict[str, str]]]] = {
    "WholebatchTTFTSlowPage": (70, latency(TTFT, "1.0", "0+2x100", "0+10x100")),
    "WholebatchTTFTSlowTicket": (400, latency(TTFT, "1.0", "0+6x500", "0+10x500")),
    "WholebatchITLSlowPage": (70, latency(ITL, "0.2", "0+8x100", "0+10x100")),
    "WholebatchITLSlowTicket": (400, latency(ITL, "0.2", "0+90x500", "0+100x500")),
    "WholebatchAuditViolated": (
        5,
        [series("wholebatch:audit_violations_total", 'job="wb",law="tokens"', "0 0 0 1x10")],
    ),
    "WholebatchNoExporter": (5, [series(UP, OF_ENGINE, "1 1 0x10")]),
    "WholebatchAbsent": (5, [series(UP, OF_ENGINE, "1 1 stale")]),
    "WholebatchStatisticsFaults": (
        5,
        [series("wholebatch:bulkhead_errors_total", 'job="wb",where="publish"', "0 0 0 2x10")],
    ),
    "WholebatchQueueGrowing": (30, [series(WAITING, OF_ENGINE, "0+5x40")]),
    "WholebatchKVCacheFull": (20, [series("vllm:kv_cache_usage_perc", OF_ENGINE, "0.99x40")]),
    "WholebatchPreemptionStorm": (
        20,
        [
            series(RECOMPUTED, OF_ENGINE, "0+300x40"),
            series(SCHEDULED, OF_ENGINE, "0+1000x40"),
            series(PREEMPTIONS, OF_ENGINE, "0+5x40"),
        ],
    ),
    "WholebatchEngineRestarting": (10, [series(RESTARTS, OF_ENGINE, "1 1 1 2x20")]),
    "WholebatchAPIServerRestarting": (10, [series(STARTS, OF_SERVER, "1 1 1 2 3 4x20")]),
}
SILENT: Mapping[str, tuple[int, list[dict[str, str]]]] = {
    # Slow for 20 minutes only, or long ago: not over both windows.
    "WholebatchTTFTSlowPage": (70, latency(TTFT, "1.0", "0+10x50 500+2x20", "0+10x70")),
    "WholebatchTTFTSlowTicket": (400, latency(TTFT, "1.0", "0+2x300 600+10x100", "0+10x400")),
    "WholebatchITLSlowPage": (70, latency(ITL, "0.2", "0+9x100", "0+10x100")),
    "WholebatchITLSlowTicket": (400, latency(ITL, "0.2", "0+95x500", "0+100x500")),
    "WholebatchAuditViolated": (
        25,
        [series("wholebatch:audit_violations_total", 'job="wb",law="tokens"', "0 0 0 1x30")],
    ),
    "WholebatchNoExporter": (
        5,
        [series(UP, OF_ENGINE, "1 1 1 0 1x10")],
    ),
    "WholebatchAbsent": (5, [series(UP, OF_ENGINE, "0x10")]),
    "WholebatchStatisticsFaults": (
        5,
        [series("wholebatch:bulkhead_errors_total", 'job="wb",where="publish"', "7x10")],
    ),
    "WholebatchQueueGrowing": (30, [series(WAITING, OF_ENGINE, "100-2x40")]),
    "WholebatchKVCacheFull": (
        20,
        [series("vllm:kv_cache_usage_perc", OF_ENGINE, "0.94x40")],
    ),
    "WholebatchPreemptionStorm": (
        20,
        [
            series(RECOMPUTED, OF_ENGINE, "0+50x40"),
            series(SCHEDULED, OF_ENGINE, "0+1000x40"),
            series(PREEMPTIONS, OF_ENGINE, "0+5x40"),
        ],
    ),
    "WholebatchEngineRestarting": (30, [series(RESTARTS, OF_ENGINE, "1 1 1 2x40")]),
    # One that was killed twice.
    "WholebatchAPIServerRestarting": (10, [series(STARTS, OF_SERVER, "1 1 1 2 3x20")]),
}


def promtool(path: Path, *command: str) -> str:
    done = subprocess.run(["promtool", *command, str(path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def rules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rules") / "wholebatch.yml"
    path.write_text(yaml.safe_dump(rule_file()))
    return path


def firing(rules: Path, directory: Path, cases: Sequence[dict[str, Any]]) -> None:
    """Runs promtool's unit tests."""
    tests = {"rule_files": [str(rules)], "evaluation_interval": "1m", "tests": list(cases)}
    path = directory / "tests.yml"
    path.write_text(yaml.safe_dump(tests))
    promtool(path, "test", "rules")


def test_every_alert_has_a_case_in_which_it_fires_and_one_in_which_it_does_not():
    assert list(FIRES) == list(SILENT)
    assert sorted(FIRES) == sorted(alert.name for alert in alerts())


@needs_promtool
def test_the_rules_are_in_order(rules: Path):
    assert "SUCCESS" in promtool(rules, "check", "rules", "--lint-fatal")


@needs_promtool
@pytest.mark.parametrize("name", ["prometheus.yml", "prometheus-discovered.yml"])
def test_a_generated_configuration_and_the_rules_it_names_are_in_order(name: str):
    answer = promtool(ROOT / "metrics" / "grafana" / name, "check", "config")
    assert f"{len(recording_rules()) + len(alerts())} rules found" in answer


@needs_promtool
@pytest.mark.parametrize("name", FIRES)
def test_an_alert_fires_and_says_about_what(rules: Path, tmp_path: Path, name: str):
    minutes, inputs = FIRES[name]
    query: dict[str, Any] = {
        "expr": f'count(ALERTS{{alertname="{name}",alertstate="firing"}})',
        "eval_time": f"{minutes}m",
    }
    query["exp_samples"] = [{"labels": "{}", "value": 1}]
    firing(rules, tmp_path, [{"interval": "1m", "input_series": inputs, "promql_expr_test": [query]}])


@needs_promtool
@pytest.mark.parametrize("name", SILENT)
def test_an_alert_is_silent_when_it_should_be(rules: Path, tmp_path: Path, name: str):
    minutes, inputs = SILENT[name]
    silent = {"eval_time": f"{minutes}m", "alertname": name, "exp_alerts": []}
    firing(rules, tmp_path, [{"interval": "1m", "input_series": inputs, "alert_rule_test": [silent]}])


@needs_promtool
def test_what_is_recorded_is_what_was_counted(rules: Path, tmp_path: Path):
    inputs = [
        series("vllm:iteration_tokens_total_sum", OF_ENGINE, "0+6000x20"),
        series("vllm:iteration_tokens_total_count", OF_ENGINE, "0+60x20"),
        series("vllm:generation_tokens_total", OF_ENGINE, "0+600x20"),
        series("vllm:generation_tokens_total", f'{OF_MODEL},engine="1",instance="b"', "0+1200x20"),
        *latency(TTFT, "1.0", "0+9x20", "0+10x20"),
    ]
    expected = {
        "engine:iteration_tokens:mean5m": (OF_ENGINE, 100),
        "model:generation_tokens:rate5m": (OF_MODEL, 30),
        "round(model:ttft_slow:ratio_rate5m, 0.001)": (OF_MODEL, 0.1),
    }
    queries = []
    for expression, (labels, value) in expected.items():
        name = "" if expression.startswith("round") else expression
        samples = [{"labels": f"{name}{{{labels}}}", "value": value}]
        queries.append({"expr": expression, "eval_time": "10m", "exp_samples": samples})
    firing(rules, tmp_path, [{"interval": "1m", "input_series": inputs, "promql_expr_test": queries}])


def fires_at(rules: Path, directory: Path, name: str, minutes: int, inputs: list[dict[str, str]], *where: str) -> None:
    """Only there, once each: `where` has instances, or deployments."""
    label = "deployment" if name == "WholebatchAbsent" else "instance"
    count = f'count by ({label}) (ALERTS{{alertname="{name}",alertstate="firing"}})'
    samples = [{"labels": f'{{{label}="{one}"}}', "value": 1} for one in where]
    query = {"expr": count, "eval_time": f"{minutes}m", "exp_samples": samples}
    firing(rules, directory, [{"interval": "1m", "input_series": inputs, "promql_expr_test": [query]}])


# Alert -> (when it fires, minutes), the name of its series, its values where it is well, and where it is not.
OF_ONE_ENGINE: Mapping[str, tuple[int, str, str, str]] = {
    "WholebatchNoExporter": (5, UP, "1x10", "1 1 0x10"),
    "WholebatchQueueGrowing": (30, WAITING, "100-2x40", "0+5x40"),
    "WholebatchKVCacheFull": (20, "vllm:kv_cache_usage_perc", "0.5x40", "0.99x40"),
    "WholebatchEngineRestarting": (10, RESTARTS, "7x20", "1 1 1 2x20"),
}


@needs_promtool
@pytest.mark.parametrize("way", TWO_DEPLOYMENTS)
@pytest.mark.parametrize("name", OF_ONE_ENGINE)
def test_an_alert_about_an_engine_names_the_one_of_two_deployments(rules: Path, tmp_path: Path, name: str, way: str):
    minutes, metric, well, ill = OF_ONE_ENGINE[name]
    first, second = TWO_DEPLOYMENTS[way]
    labels = f'{OF_MODEL},engine="0"'
    inputs = [
        series(metric, f'{labels},instance="{first}"', well),
        series(metric, f'{labels},instance="{second}"', ill),
    ]
    fires_at(rules, tmp_path, name, minutes, inputs, second)


@needs_promtool
@pytest.mark.parametrize("way", TWO_DEPLOYMENTS)
def test_a_queue_that_grows_and_another_that_is_long_are_no_growing_queue(rules: Path, tmp_path: Path, way: str):
    first, second = TWO_DEPLOYMENTS[way]
    inputs = [
        series(WAITING, f'{OF_MODEL},engine="0",instance="{first}"', "0+0.1x40"),
        series(WAITING, f'{OF_MODEL},engine="0",instance="{second}"', "100-1x40"),
    ]
    fires_at(rules, tmp_path, "WholebatchQueueGrowing", 30, inputs)


@needs_promtool
@pytest.mark.parametrize("way", TWO_DEPLOYMENTS)
def test_a_storm_of_preemptions_is_of_the_deployment_that_has_it(rules: Path, tmp_path: Path, way: str):
    inputs = []
    for instance, recomputed in zip(TWO_DEPLOYMENTS[way], ("0+10x40", "0+300x40"), strict=True):
        labels = f'{OF_MODEL},engine="0",instance="{instance}"'
        inputs += [
            series(RECOMPUTED, labels, recomputed),
            series(SCHEDULED, labels, "0+1000x40"),
            series(PREEMPTIONS, labels, "0+5x40"),
        ]
    fires_at(rules, tmp_path, "WholebatchPreemptionStorm", 20, inputs, TWO_DEPLOYMENTS[way][1])


@needs_promtool
@pytest.mark.parametrize("parts", [[""], ["/engine-0", "/processes", "/api-server-0"]], ids=TWO_DEPLOYMENTS)
def test_one_deployment_of_two_that_answers_nothing_is_absent_once(rules: Path, tmp_path: Path, parts: list[str]):
    inputs = [series("up", f'job="wb",instance="a:8000{part}"', "1x10") for part in parts]
    inputs += [series("up", f'job="wb",instance="b:8000{part}"', "1 1 0x10") for part in parts]
    inputs += [series(UP, f'{OF_MODEL},engine="0",instance="a:8000{parts[0]}"', "1x10")]
    fires_at(rules, tmp_path, "WholebatchAbsent", 5, inputs, "b:8000")
    # Neither a process that is down, nor a job that has nothing to do with it, is an absent deployment.
    inputs = [series("up", f'job="wb",instance="a:8000{part}"', "1x10") for part in ["/engine-0", "/processes"]]
    inputs += [series("up", 'job="wb",instance="a:8000/api-server-0"', "0x10"), series("up", 'job="x"', "0x10")]
    inputs += [series(UP, f'{OF_MODEL},engine="0",instance="a:8000/engine-0"', "1x10")]
    fires_at(rules, tmp_path, "WholebatchAbsent", 5, inputs)


def test_every_rule_reads_the_catalogue_and_every_alert_says_so():
    for name, expression in recording_rules().items():
        assert metrics_in(expression), name
        assert name.count(":") == 2
    for alert in alerts():
        rule = alert.rule()
        assert rule["annotations"]["description"], alert.name
        assert rule["labels"]["severity"] in ("page", "ticket")


def test_a_service_levels_bound_is_a_bucket():
    assert all(level.bound_s in BUCKETS[level.buckets] for level in SERVICE_LEVELS)
