"""The dashboards, rules and scrape configurations for Grafana and Prometheus, made from the catalogue.

Street: truth, beyond its end. A query names only what the catalogue declares, so none can ask for what does not exist.
"""
