"""The old way, kept to be compared with: iteration statistics rebuilt from what one API server gets back.

Run in place of `frontend.server` (see `serve_partial`), it is that server, and besides keeps what an API server can
know of an iteration: the new tokens in one message of the engine, and the whole prompt of every request whose first
token came with it. One observation a message. At its end it writes the observations to the directory that
WHOLEBATCH_PARTIAL_DIR names.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from engine.wire import Outputs
from frontend import server
from frontend.engines import engine_client

OBSERVATIONS: list[int] = []


class ObservedConnection(engine_client.EngineConnection):
    """Looks at every message before it is handled."""

    def _on_outputs(self, outputs: Outputs) -> None:
        tokens = 0
        for output in outputs.outputs:
            known = self._open.get(output.request_id)
            if known is not None and output.first_index == 0 and output.token_ids:
                tokens += known[0]._asked.num_prompt_tokens
            tokens += len(output.token_ids)
        OBSERVATIONS.append(tokens)
        super()._on_outputs(outputs)


def observations(directory: Path) -> list[int]:
    """What all API servers of an ended deployment observed."""
    return [tokens for path in sorted(directory.glob("*.json")) for tokens in json.loads(path.read_text())]


def main() -> None:
    engine_client.EngineConnection = ObservedConnection  # type: ignore[misc]
    try:
        server.main()
    finally:
        (Path(os.environ["WHOLEBATCH_PARTIAL_DIR"]) / f"{os.getpid()}.json").write_text(json.dumps(OBSERVATIONS))


if __name__ == "__main__":
    main()
