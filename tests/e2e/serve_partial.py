"""`python -m tests.e2e.serve_partial`: `engine.serve`, with API servers that also keep statistics the old way."""

import sys

from engine.serve import main

if __name__ == "__main__":
    sys.exit(main(api_server_module="tests.e2e.partial_batches"))
