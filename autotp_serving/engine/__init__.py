"""The engine: which request runs when, in which blocks, and what text comes of it.

Rank 0 only, plain Python over integers, never torch.
"""

from __future__ import annotations

from autotp_serving.engine.active_requests import QueueFullError, ShareFullError
from autotp_serving.engine.engine import Engine, EngineError
from autotp_serving.engine.groups import EngineGroups
from autotp_serving.engine.stats import EngineStats

__all__ = [
    "Engine",
    "EngineError",
    "EngineGroups",
    "EngineStats",
    "QueueFullError",
    "ShareFullError",
]
