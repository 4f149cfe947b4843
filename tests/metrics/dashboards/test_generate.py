"""What is made from the catalogue: every file that Prometheus and Grafana read."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import yaml

from metrics.dashboards.generate import ROOT, grafana_files, main
from metrics.dashboards.provisioning import HOME, RULES, compose

GRAFANA = ROOT / "metrics" / "grafana"


def test_a_file_that_is_changed_missing_or_left_over_is_found_and_put_right(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    grafana = tmp_path / "grafana"
    assert main(["--check", str(grafana)]) == 1
    assert not grafana.exists()
    assert main([str(grafana)]) == 0
    changed, missing = grafana / RULES, grafana / "dashboards" / "overview.json"
    left_over, picture = grafana / "dashboards" / "old.json", grafana / "overview.png"
    changed.write_text(changed.read_text() + "# more\n")
    missing.unlink()
    left_over.write_text("{}")
    picture.write_bytes(b"")
    capsys.readouterr()
    assert main(["--check", str(grafana)]) == 1
    named = {line.partition(":")[0] for line in capsys.readouterr().err.splitlines()}
    assert named == {str(changed), str(missing), str(left_over)}
    assert main([str(grafana)]) == 0
    assert (missing.exists(), left_over.exists(), picture.exists()) == (True, False, True)
    assert main(["--check", str(grafana)]) == 0


def test_the_files_that_are_checked_in_are_what_the_catalogue_makes():
    made = grafana_files()
    assert {path: (GRAFANA / path).read_text() for path in made} == made


# --- what the containers mount ---


def mounted(service: dict[str, Any]) -> dict[str, str]:
    """Path in the container -> path below metrics/grafana/."""
    volumes = [volume.split(":") for volume in service["volumes"]]
    assert all(mode == "ro" for _, _, mode in volumes)
    return {inside: str(PurePosixPath(outside)) for outside, inside, _ in volumes}


def found(service: dict[str, Any], inside: str) -> Path:
    """The generated file that a container has under this path."""
    for target, source in mounted(service).items():
        if PurePosixPath(inside).is_relative_to(target):
            return GRAFANA / source / PurePosixPath(inside).relative_to(target)
    raise AssertionError(f"not mounted: {inside}")


def test_prometheus_finds_its_configuration_and_rules():
    service = compose()["services"]["prometheus"]
    (config,) = [flag.partition("=")[2] for flag in service["command"] if flag.startswith("--config.file")]
    for rules in yaml.safe_load(found(service, config).read_text())["rule_files"]:
        path = found(service, str(PurePosixPath(config).parent / rules))
        assert yaml.safe_load(path.read_text())["groups"]


def test_grafana_finds_its_data_source_and_dashboards():
    service = compose()["services"]["grafana"]
    provisioning = found(service, service["environment"]["GF_PATHS_PROVISIONING"])
    (provider,) = yaml.safe_load((provisioning / "dashboards" / "wholebatch.yaml").read_text())["providers"]
    assert len(list(found(service, provider["options"]["path"]).glob("*.json"))) == 4
    assert found(service, service["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]).is_file()


def test_grafana_asks_the_prometheus_that_is_started_beside_it():
    services = yaml.safe_load((GRAFANA / "compose.yaml").read_text())["services"]
    (address,) = [f.partition("=")[2] for f in services["prometheus"]["command"] if "web.listen-address" in f]
    (source,) = yaml.safe_load((GRAFANA / "provisioning/datasources/wholebatch.yaml").read_text())["datasources"]
    assert source["url"] == f"http://{address}"
    assert source["isDefault"]
    assert all(service["network_mode"] == "host" for service in services.values())
    assert all(re.fullmatch(r"[\w/]+:v?\d+\.\d+\.\d+", service["image"]) for service in services.values())
    assert address.startswith("127.0.0.1:")
    assert services["grafana"]["environment"]["GF_SERVER_HTTP_ADDR"] == "127.0.0.1"


def test_what_is_mounted_is_there():
    for service in compose()["services"].values():
        assert mounted(service)
        for inside, outside in mounted(service).items():
            assert inside.startswith(HOME)
            assert (GRAFANA / outside).exists()
