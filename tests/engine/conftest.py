"""Every test of the control side runs with one step in flight and with two."""

from __future__ import annotations

import pytest

from tests.fakes import FakeRunner


@pytest.fixture(params=[1, 2], autouse=True)
def max_in_flight(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """How many steps fake runners take at once, unless one says otherwise."""
    monkeypatch.setattr(FakeRunner, "max_in_flight", request.param)
    return request.param
