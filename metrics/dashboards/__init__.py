"""What is generated for Grafana and Prometheus from the catalogue."""
