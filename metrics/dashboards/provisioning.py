"""What two containers, or two packages, need to show the dashboards: scrape configurations, data source, compose. Pure.

Both containers use the host's network and listen on its loopback only, so that one set of files serves containers and
packages alike, whichever address the deployment listens on. Two ways to scrape, of which a Prometheus takes one: the
public port, which is the whole deployment, or the targets that it lists, each process by itself. Both at once would
count everything twice.
"""

from __future__ import annotations

from typing import Any, Final

PUBLIC: Final = "127.0.0.1:8000"
PROMETHEUS: Final = "127.0.0.1:9090"
GRAFANA_PORT: Final = "3000"
DATASOURCE_UID: Final = "wholebatch-prometheus"
RULES: Final = "rules/wholebatch.yml"
HOME: Final = "/etc/wholebatch"  # where a container has these files

Content = dict[str, Any]


def scrape_config(job: Content) -> Content:
    return {
        "global": {"scrape_interval": "1s", "evaluation_interval": "5s"},
        "rule_files": [RULES],
        "scrape_configs": [{"job_name": "wholebatch", **job}],
    }


def compose() -> Content:
    """Docker Compose's file: `docker compose -f metrics/grafana/compose.yaml up`."""
    prometheus_flags = [
        f"--config.file={HOME}/prometheus.yml",
        f"--web.listen-address={PROMETHEUS}",
        "--storage.tsdb.path=/prometheus",
        "--enable-feature=exemplar-storage",
    ]
    environment = {
        "GF_SERVER_HTTP_ADDR": "127.0.0.1",
        "GF_SERVER_HTTP_PORT": GRAFANA_PORT,
        "GF_AUTH_ANONYMOUS_ENABLED": "true",
        "GF_AUTH_ANONYMOUS_ORG_ROLE": "Viewer",
        "GF_PATHS_PROVISIONING": f"{HOME}/provisioning",
        "GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH": f"{HOME}/dashboards/overview.json",
    }
    shared = {"network_mode": "host", "restart": "unless-stopped"}
    return {
        "services": {
            "prometheus": {
                "image": "prom/prometheus:v3.1.0",
                **shared,
                "command": prometheus_flags,
                "volumes": [f"./prometheus.yml:{HOME}/prometheus.yml:ro", f"./rules:{HOME}/rules:ro"],
            },
            "grafana": {
                "image": "grafana/grafana:11.6.0",
                **shared,
                "environment": environment,
                "volumes": [
                    f"./provisioning:{HOME}/provisioning:ro",
                    f"./dashboards:{HOME}/dashboards:ro",
                ],
            },
        }
    }


def datasource() -> Content:
    source = {
        "name": "wholebatch",
        "uid": DATASOURCE_UID,
        "type": "prometheus",
        "access": "proxy",
        "url": f"http://{PROMETHEUS}",
        "isDefault": True,
        # Grafana's $__rate_interval is at least four of these.
        "jsonData": {"timeInterval": "1s", "httpMethod": "POST"},
    }
    return {"apiVersion": 1, "datasources": [source]}


def dashboard_provider() -> Content:
    provider = {
        "name": "wholebatch",
        "folder": "wholebatch",
        "type": "file",
        "allowUiUpdates": False,
        "options": {"path": f"{HOME}/dashboards"},
    }
    return {"apiVersion": 1, "providers": [provider]}


def files() -> dict[str, Content]:
    """Path below metrics/grafana/ -> content."""
    public = scrape_config({"static_configs": [{"targets": [PUBLIC]}]})
    discovered = scrape_config(
        {"http_sd_configs": [{"url": f"http://{PUBLIC}/prometheus/targets", "refresh_interval": "5s"}]}
    )
    return {
        "prometheus.yml": public,
        "prometheus-discovered.yml": discovered,
        "compose.yaml": compose(),
        "provisioning/datasources/wholebatch.yaml": datasource(),
        "provisioning/dashboards/wholebatch.yaml": dashboard_provider(),
    }
