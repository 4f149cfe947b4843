"""`make bench`: all benchmarks one after another, or those named: `make bench ARGS='scrape statistics_cost'`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

NOT_BENCHMARKS = (
    "__main__",
    "arrivals",
    "bench_check",  # make bench-check
    "dashboard_pictures",
    "deployed",
    "export_model",
    "inside_vllm",  # needs vLLM, in an environment of its own; so does vllm_cost
    "instant_engine",
    "llama_cpp",  # runs in an environment of its own
    "report",
    "roofline",
    "serve_instant",
    "sides",
    "sse_client",
    "vllm_cost",
)


def main() -> int:
    known = sorted(p.stem for p in Path(__file__).parent.glob("*.py") if p.stem not in NOT_BENCHMARKS)
    names = sys.argv[1:] or known
    for name in names:
        if name not in known:
            print(f"no benchmark {name!r}; there are: {', '.join(known)}", file=sys.stderr)
            return 2
    return max(subprocess.run([sys.executable, "-m", f"tests.benchmarks.{name}"]).returncode for name in names)


if __name__ == "__main__":
    sys.exit(main())
