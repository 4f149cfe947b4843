"""What Grafana and Prometheus are given, made from the catalogue: dashboards, rules, scrape configurations.

Street: truth, beyond its end. A query names only what the catalogue declares, so none can ask for what does not exist.
"""
