"""What a start tells of its progress and its silence."""

from __future__ import annotations

import logging
import time

import pytest

from autotp_serving import progress
from autotp_serving.progress import Progress, tell_silence


def test_progress_is_told_now_and_then(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = [0.0]
    monkeypatch.setattr(progress, "SECONDS", 3.0)
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    caplog.set_level(logging.INFO, "autotp_serving")
    counts = [Progress("Loading", 4 * 10**9, is_shown=shown) for shown in (True, False)]
    for clock[0] in (1.0, 2.0, 4.0, 5.0, 8.0):
        for count in counts:
            count.advance(8 * 10**8)
    assert caplog.messages == ["Loading: 2.4 GB of 4.0 GB"]


def test_silence_is_told_with_what_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(progress, "SECONDS", 0.2)
    caplog.set_level(logging.INFO, "autotp_serving")
    logger = logging.getLogger("autotp_serving.test")
    with tell_silence():
        logger.info("Compiling x")
        deadline = time.monotonic() + 20
        while len(caplog.messages) < 3 and time.monotonic() < deadline:
            time.sleep(0.05)
    assert caplog.messages[0] == "Compiling x"
    for line in caplog.messages[1:]:
        assert line.startswith("Still at it after") and line.endswith(": Compiling x")
    assert len(caplog.messages) >= 3
    assert not any(isinstance(one, progress._Latest) for one in logger.parent.handlers)
