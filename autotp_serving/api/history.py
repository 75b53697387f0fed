"""What comes back of earlier turns, read generously: clients send it as they got it. Rank 0.

Requests are read strictly (`schemas.StrictModel`), so that no typo goes unnoticed; but an agent
must never be poisoned by its own history.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class HistoryModel(BaseModel):
    """A part of a conversation: what is not known of it is not looked at."""

    model_config = ConfigDict(strict=True, extra="ignore")
