"""The contract between processes: messages, the deployment table, reports, and what a child is told at its start.

Street: work. It is all of the engine that `frontend` may import. Whatever comes from another process is checked where
it is decoded; what does not fit raises `WireError`, and the receiver counts it and drops it.
"""

from __future__ import annotations

from engine.bounds import default, limits
from engine.config import QUEUED_REQS, QUEUED_TOKENS
from engine.wire.codec import WIRE_VERSION, WireError, encode
from engine.wire.deployment import (
    DEPLOYMENT_TOPIC,
    Alive,
    Deployment,
    Facts,
    Failed,
    ProcessEntry,
    Ready,
    Report,
    decode_deployment,
    deployment_endpoint,
)
from engine.wire.lifeline import STOP_SIGNAL, Lifeline, make_lifeline, obey_the_supervisor_alone, read_reports
from engine.wire.messages import (
    FINISH_REASONS,
    MAX_SALT_CHARS,
    Abort,
    Finish,
    Goodbye,
    Hello,
    Output,
    Outputs,
    Start,
    Submit,
    decode_from_api_server,
    decode_from_engine,
    identity,
    parse_identity,
    work_endpoint,
)
from engine.wire.sampling import (
    LEAST_TEMPERATURE,
    MAX_BIAS,
    MAX_CONSTRAINT_CHARS,
    MAX_LOGPROBS,
    SamplingParams,
    TokenLogprobs,
)
from engine.wire.start import EngineConfig, ServerConfig, decode_engine_config, decode_server_config

__all__ = [
    "DEPLOYMENT_TOPIC",
    "FINISH_REASONS",
    "LEAST_TEMPERATURE",
    "MAX_BIAS",
    "MAX_CONSTRAINT_CHARS",
    "MAX_LOGPROBS",
    "MAX_SALT_CHARS",
    "QUEUED_REQS",
    "QUEUED_TOKENS",
    "STOP_SIGNAL",
    "WIRE_VERSION",
    "Abort",
    "Alive",
    "Deployment",
    "EngineConfig",
    "Facts",
    "Failed",
    "Finish",
    "Goodbye",
    "Hello",
    "Lifeline",
    "Output",
    "Outputs",
    "ProcessEntry",
    "Ready",
    "Report",
    "SamplingParams",
    "ServerConfig",
    "Start",
    "Submit",
    "TokenLogprobs",
    "WireError",
    "decode_deployment",
    "decode_engine_config",
    "decode_from_api_server",
    "decode_from_engine",
    "decode_server_config",
    "default",
    "deployment_endpoint",
    "encode",
    "identity",
    "limits",
    "make_lifeline",
    "obey_the_supervisor_alone",
    "parse_identity",
    "read_reports",
    "work_endpoint",
]
