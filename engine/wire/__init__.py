"""The contract between processes: messages, the deployment table, reports, and what a child is told at its start.

Street: work. It is all of the engine that `frontend` may import. Whatever comes from another process is checked where
it is decoded; what does not fit raises an error, and the receiver counts it and drops it.
"""

from __future__ import annotations

from engine.wire.deployment import (
    DEPLOYMENT_TOPIC,
    Alive,
    Deployment,
    DeploymentError,
    Facts,
    Failed,
    ProcessEntry,
    Ready,
    Report,
    decode_deployment,
    encode_deployment,
)
from engine.wire.lifeline import Lifeline, make_lifeline, read_reports
from engine.wire.messages import (
    FINISH_REASONS,
    Abort,
    Finish,
    Goodbye,
    Hello,
    Output,
    Outputs,
    Start,
    Submit,
    WireError,
    decode_from_api_server,
    decode_from_engine,
    encode,
    identity,
    parse_identity,
    work_endpoint,
)
from engine.wire.sampling import (
    GREATEST_REPETITION_PENALTY,
    LEAST_REPETITION_PENALTY,
    LEAST_TEMPERATURE,
    MAX_LOGPROBS,
    SamplingParams,
    TokenLogprobs,
)

__all__ = [
    "DEPLOYMENT_TOPIC",
    "FINISH_REASONS",
    "GREATEST_REPETITION_PENALTY",
    "LEAST_REPETITION_PENALTY",
    "LEAST_TEMPERATURE",
    "MAX_LOGPROBS",
    "Abort",
    "Alive",
    "Deployment",
    "DeploymentError",
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
    "Start",
    "Submit",
    "TokenLogprobs",
    "WireError",
    "decode_deployment",
    "decode_from_api_server",
    "decode_from_engine",
    "encode",
    "encode_deployment",
    "identity",
    "make_lifeline",
    "parse_identity",
    "read_reports",
    "work_endpoint",
]
