"""The client side of the wire: connections to engines, and the requests on them.

Street: work. It says which engine gets a request and whether one more may wait, and holds every token that arrives
until it is counted as delivered or undelivered (P6).
"""

from __future__ import annotations

from frontend.engines.admission import Admission, InFlight, Limits
from frontend.engines.engine_client import EngineClients, Identity
from frontend.engines.generation import Ask, Asked, Delta, Generation, Observer

__all__ = [
    "Admission",
    "Ask",
    "Asked",
    "Delta",
    "EngineClients",
    "Generation",
    "Identity",
    "InFlight",
    "Limits",
    "Observer",
]
