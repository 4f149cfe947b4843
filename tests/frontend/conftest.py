"""API servers for a test, without processes: sockets in a directory of their own."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from typing import Any

import pytest

from tests.frontend.deployments import Deployed


@pytest.fixture
async def deploy() -> AsyncIterator[Callable[..., Any]]:
    async with AsyncExitStack() as stack:

        async def make(num_api_servers: int, num_engines: int = 1, **changes: Any) -> Deployed:
            deployed = Deployed(stack, num_api_servers, num_engines, **changes)
            await deployed.begin()
            return deployed

        yield make
