"""The same truth inside a running vLLM: its engine cores count their own iterations, and this is what counts there.

Street: truth, in vLLM's processes. `make_scheduler` is what `--scheduler-cls` names; `frontend.vllm` answers scrapes
from what it wrote. Nothing of vLLM is imported before vLLM itself asks, and no fault of ours reaches it.
"""

from __future__ import annotations

from engine.vllm.meeting import (
    Core,
    HookError,
    claim_server,
    directory,
    find_cores,
    find_servers,
    hook_bulkhead,
    server_layout,
)
from engine.vllm.scheduler import make_scheduler

__all__ = [
    "Core",
    "HookError",
    "claim_server",
    "directory",
    "find_cores",
    "find_servers",
    "hook_bulkhead",
    "make_scheduler",
    "server_layout",
]
