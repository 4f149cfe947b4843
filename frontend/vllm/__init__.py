"""The API servers of a running vLLM: what `GET /metrics` answers there with our part in it.

Street: truth, in vLLM's processes. `Metrics` is what `--middleware` names; `engine.vllm` counts.
"""

from __future__ import annotations

from frontend.vllm.middleware import Metrics

__all__ = ["Metrics"]
