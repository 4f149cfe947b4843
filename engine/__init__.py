"""The engine: one GPU loop per process, the only witness of what an iteration did."""
