"""`python -m tests.e2e.serve_faulty`: `engine.serve`, with children whose statistics plane fails all the time."""

import sys

from engine.serve import main

if __name__ == "__main__":
    sys.exit(main(engine_module="tests.e2e.faulty_engine", api_server_module="tests.e2e.faulty_api_server"))
