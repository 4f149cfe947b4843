"""`python -m engine.serve`: flags to a configuration, the sockets and the directory, then the supervisor.

Whatever cannot be served is one line on stderr and exit code 2, before any process is started where that is possible.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import resource
import sys
from pathlib import Path

import setproctitle

from engine.config import API_KEY_VARIABLE
from engine.flags import FlagError, parse
from engine.supervisor import DeploymentDirectory, DirectoryError, ListenError, Supervisor, listen
from metrics.broadcast import BroadcastError
from metrics.files import StoreError


def main(
    arguments: list[str] | None = None,
    *,
    engine_module: str = "engine.loop.process",
    api_server_module: str = "frontend.server",
) -> int:
    """The exit code: 0 after a signal, 1 when the deployment failed later, 2 for what cannot be served. The modules
    are what the children run; others wrap them to observe."""
    _open_standard_descriptors()
    _raise_descriptor_limit()
    environment = dict(os.environ)
    os.environ.pop(API_KEY_VARIABLE, None)  # children are told by descriptor, and inherit no secret
    try:
        config = parse(sys.argv[1:] if arguments is None else arguments, environment)
        config = dataclasses.replace(config, engine_module=engine_module, api_server_module=api_server_module)
        setproctitle.setproctitle("wholebatch supervisor")  # and no more flags, keys among them, in `ps`
        form = "%(asctime)s level=%(levelname)s process=supervisor %(message)s"
        logging.basicConfig(level=logging.INFO, stream=sys.stderr, format=form)
        public = listen(config.http.host, config.http.port)
        directory = DeploymentDirectory.create(Path(config.runtime_directory))
        try:
            supervisor = Supervisor(config, directory, public)
        except (ListenError, BroadcastError, StoreError):
            directory.remove()
            raise
    except (FlagError, ListenError, DirectoryError, BroadcastError, StoreError) as error:
        print(f"engine.serve: {' '.join(str(error).split())}", file=sys.stderr)  # one line, whatever a path holds
        return 2
    except KeyboardInterrupt:
        return 130  # while the default model was fetched; nothing runs yet
    return supervisor.run()


def _open_standard_descriptors() -> None:
    """Where one of 0 to 2 is closed, a socket would take its place, and lose it to the children's own."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)


def _raise_descriptor_limit() -> None:
    """To as many as are allowed, for the children too: a soft limit of 1024 is a promise of old programs to old ones,
    and every connection needs one."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # where even that is not allowed, what there is has to do
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


if __name__ == "__main__":
    sys.exit(main())
