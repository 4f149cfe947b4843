"""`python -m tests.benchmarks.serve_instant`: `engine.serve`, with engines that make tokens without a model."""

import sys

from engine.serve import main

if __name__ == "__main__":
    sys.exit(main(engine_module="tests.benchmarks.instant_engine"))
