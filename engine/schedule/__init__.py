"""Which tokens run in an iteration, and what that iteration counts. Pure.

Street: both. Here work becomes truth: the scheduler decides what a batch consists of, and its own counts are what the
recorder writes down. Nothing is counted from what comes back.
"""

from __future__ import annotations

from engine.schedule.batch import Batch, IterationCounts, Runner, SampledToken, ScheduledSequence
from engine.schedule.block_pool import BlockPool
from engine.schedule.console import Console
from engine.schedule.record import Recorder
from engine.schedule.request import RequestState
from engine.schedule.scheduler import Scheduler
from engine.wire import LEAST_TEMPERATURE, SamplingParams, TokenLogprobs

__all__ = [
    "LEAST_TEMPERATURE",
    "Batch",
    "BlockPool",
    "Console",
    "IterationCounts",
    "Recorder",
    "RequestState",
    "Runner",
    "SampledToken",
    "SamplingParams",
    "ScheduledSequence",
    "Scheduler",
    "TokenLogprobs",
]
