"""The engines, the only witnesses of what an iteration did, and the supervisor that starts all processes.

`engine.serve` is the command. It needs no tensors: only an engine process imports `engine.loop` and `engine.device`.
"""
