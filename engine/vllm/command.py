"""`wholebatch-vllm serve …`: vLLM's own command with our part in it.

    wholebatch-vllm serve MODEL --api-server-count 4 [any flag of `vllm serve`]

Everything is passed on to vLLM, in this process, with two of its public flags added: --scheduler-cls and --middleware.
Exit code 2: there is no vLLM here, or one that is too old.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import re
import sys
from typing import Final

from engine.supervisor import DeploymentDirectory, DirectoryError, default_runtime_directory
from engine.vllm.scheduler import SCHEDULER_VARIABLE
from metrics.vllm import DIRECTORY_VARIABLE

LEAST_VERSION: Final = (0, 32)
_SCHEDULER_FLAG: Final = "--scheduler-cls"


class CommandError(Exception):
    """The command cannot run; the text says why, in one line."""


def main() -> None:
    """The console script."""
    try:
        arguments, scheduler = with_our_part(sys.argv[1:])
        check_version()
        directory = DeploymentDirectory.create(default_runtime_directory())
    except (CommandError, DirectoryError) as error:
        print(f"wholebatch-vllm: {error}", file=sys.stderr)
        sys.exit(2)
    os.environ[DIRECTORY_VARIABLE] = str(directory.path)
    if scheduler is not None:
        os.environ[SCHEDULER_VARIABLE] = scheduler
    sys.argv = ["vllm", *arguments]
    try:
        importlib.import_module("vllm.entrypoints.cli.main").main()
    finally:
        directory.remove()


def with_our_part(arguments: list[str]) -> tuple[list[str], str | None]:
    """vLLM's arguments, and the scheduler class that the operator named, if any: ours goes before it. Raises
    CommandError."""
    if arguments[:1] != ["serve"]:
        raise CommandError("usage: wholebatch-vllm serve MODEL [any flag of `vllm serve`]")
    kept: list[str] = []
    scheduler = None
    rest = iter(arguments)
    for argument in rest:
        name, equals, value = argument.partition("=")
        if name.replace("_", "-") != _SCHEDULER_FLAG:
            kept.append(argument)
            continue
        scheduler = value if equals else next(rest, "")
        if not scheduler:
            raise CommandError(f"{_SCHEDULER_FLAG} needs a value")
    added = [f"{_SCHEDULER_FLAG}=engine.vllm.make_scheduler", "--middleware=frontend.vllm.Metrics"]
    return [*kept, *added], scheduler


def check_version() -> None:
    """Raises CommandError where there is no vLLM, or one of before LEAST_VERSION."""
    try:
        version = importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        raise CommandError("vLLM is not installed in this environment: pip install vllm") from None
    found = re.match(r"(\d+)\.(\d+)", version)
    if found is not None and (int(found[1]), int(found[2])) < LEAST_VERSION:
        least = ".".join(map(str, LEAST_VERSION))
        raise CommandError(f"vLLM {version} is too old, {least} is the first one that works")


if __name__ == "__main__":
    main()
