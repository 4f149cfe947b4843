"""An operator's own scheduler class, which writes a line for every batch: an independent witness in a running vLLM."""

from __future__ import annotations

import os
from typing import Any, Final

from vllm.v1.core.sched.scheduler import Scheduler

LOG_VARIABLE: Final = "WHOLEBATCH_TEST_ITERATIONS"


class Logged(Scheduler):  # type: ignore[misc]  # vLLM is not there where types are checked
    """Appends the number of tokens of each batch that has any to the file that the environment names."""

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        output = super().schedule(*args, **kwargs)
        if output.total_num_scheduled_tokens:
            index = self.parallel_config.data_parallel_index
            with open(f"{os.environ[LOG_VARIABLE]}.{index}", "a") as file:
                file.write(f"{output.total_num_scheduled_tokens}\n")
        return output
