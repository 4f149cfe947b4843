"""The same truth inside a running vLLM: its engine cores count their own iterations, and this is what counts there.

Street: truth, in vLLM's processes. `make_scheduler` is what `--scheduler-cls` names; `frontend.vllm` answers scrapes
from what it wrote (`metrics.vllm`). Nothing of vLLM is imported before vLLM itself asks, and no fault of ours reaches
it.
"""

from __future__ import annotations

from engine.vllm.scheduler import make_scheduler

__all__ = ["make_scheduler"]
