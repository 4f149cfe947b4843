"""The API servers: HTTP in front, `engine.wire` behind, request-level counters only."""
