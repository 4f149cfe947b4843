"""The API servers: HTTP in front, `engine.wire` behind, and counts of their own requests only.

Each is one process with one event loop. It sees a part of every iteration, and therefore counts none.
"""
