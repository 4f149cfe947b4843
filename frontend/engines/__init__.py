"""The client side of the wire: connections to engines, and the requests on them."""

from __future__ import annotations

from frontend.engines.admission import Admission, InFlight, Limits
from frontend.engines.engine_client import EngineClients, Identity
from frontend.engines.generation import Delta, Generation

__all__ = [
    "Admission",
    "Delta",
    "EngineClients",
    "Generation",
    "Identity",
    "InFlight",
    "Limits",
]
