"""Targets for Prometheus: where each is reached from where the question came, under a name that stays."""

from __future__ import annotations

import pytest

from frontend.scrape.discovery import targets
from tests.frontend.deployments import make_config

ADMIN = [["127.0.0.1", 9001], ["0.0.0.0", 9002], ["::", 9003], ["::1", 9004]]


def test_every_admin_port_every_engine_and_the_other_processes_are_a_target_each():
    config = make_config("/run/x", num_api_servers=4, num_engines=2, admin_addresses=ADMIN)
    found = [
        (group["targets"], group["labels"]["__metrics_path__"], group["labels"]["instance"])
        for group in targets(config, "inference.example:8000")
    ]
    assert found == [
        (["127.0.0.1:9001"], "/metrics/own", "inference.example:8000/api-server-0"),
        (["inference.example:9002"], "/metrics/own", "inference.example:8000/api-server-1"),
        (["inference.example:9003"], "/metrics/own", "inference.example:8000/api-server-2"),
        (["[::1]:9004"], "/metrics/own", "inference.example:8000/api-server-3"),
        (["inference.example:8000"], "/metrics/engine/0", "inference.example:8000/engine-0"),
        (["inference.example:8000"], "/metrics/engine/1", "inference.example:8000/engine-1"),
        (["inference.example:8000"], "/metrics/processes", "inference.example:8000/processes"),
    ]


@pytest.mark.parametrize(
    ("asked", "public"),
    [
        ("localhost:80", "localhost:80"),
        ("localhost", "localhost:80"),
        ("[::1]:8000", "[::1]:8000"),
        ("", "127.0.0.1:8000"),
        ("a b:1", "127.0.0.1:8000"),
        ("evil/path:80", "127.0.0.1:8000"),
        ("x:port", "127.0.0.1:8000"),
        ('"}:1', "127.0.0.1:8000"),
    ],
)
def test_the_public_address_is_the_one_asked_for_if_it_is_one(asked: str, public: str):
    config = make_config("/run/x", host="0.0.0.0")
    assert targets(config, asked)[-1] == {
        "targets": [public],
        "labels": {"__metrics_path__": "/metrics/processes", "instance": f"{public}/processes"},
    }


def test_no_two_deployments_share_an_instance():
    config = make_config("/run/x", num_api_servers=2, num_engines=2, admin_addresses=ADMIN[:2])
    here, there = ({group["labels"]["instance"] for group in targets(config, host)} for host in ("a:8000", "a:8001"))
    assert len(here) == len(there) == 5
    assert not here & there
