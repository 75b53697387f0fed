"""What the engine is told while groups of ranks come and go."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest

from autotp_serving.config import ServingConfig
from autotp_serving.head import supervisor as module
from autotp_serving.head.places import GroupPlace
from autotp_serving.head.ranks import RanksLost, RanksRefused
from autotp_serving.head.runner import RemoteRunner
from autotp_serving.head.supervisor import Supervisor, start_groups
from autotp_serving.head.wire import Ready
from tests.engine.test_engine import wait_for

READY = Ready(8, 16, 1, False, False, 512, 257)


class Group:
    """Ranks that do as the script says: `Ready`, or the exception that they end with."""

    script: list[Ready | Exception]
    made: list[Group]
    line = None

    def __init__(self, *_: object) -> None:
        self.made.append(self)
        self.is_killed = False
        self._lost = threading.Event()
        self._reason = ""

    def wait_ready(self, seconds: float) -> Ready:
        step = self.script[len(self.made) - 1]
        if isinstance(step, Exception):
            raise step
        return step

    def watch(self) -> None:
        pass

    def lose(self, reason: str) -> None:
        self._reason = self._reason or reason
        self._lost.set()

    def wait_loss(self) -> str:
        assert self._lost.wait(20)
        return self._reason

    def stop(self) -> None:
        self.kill()

    def kill(self) -> None:
        self.is_killed = True


class Told:
    """In place of the engine."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def lose(self, reason: str) -> None:
        self.told.append(f"lost: {reason}")

    def resume(self, attach: Callable[[], None]) -> None:
        attach()
        self.told.append("resume")

    def fail(self, message: str) -> None:
        self.told.append(f"failed: {message}")


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Supervisor]]:
    made: list[Supervisor] = []
    monkeypatch.setattr(module, "RankProcesses", Group)
    monkeypatch.setattr(module, "LAST_WORDS_SECONDS", 0.0)
    monkeypatch.setattr(module, "MAX_DELAY_SECONDS", 0.01)

    def start_one(*script: Ready | Exception) -> Supervisor:
        Group.script, Group.made = list(script), []
        config = ServingConfig(model_path="fake", max_restarts=2)
        made.append(Supervisor([], config, 2, RemoteRunner()))
        return made[-1]

    yield start_one
    for one in made:
        one.stop()
        assert all(group.is_killed for group in Group.made)


def test_ranks_are_started_anew_as_often_as_they_may(start):
    supervisor, engine = (
        start(READY, RanksLost("rank 0 has died"), READY._replace(num_blocks=7)),
        Told(),
    )
    assert supervisor.start() == READY
    supervisor.give_engine(engine)
    supervisor.end_group("step 3 has not ended")
    wait_for(lambda: "resume" in engine.told)
    assert engine.told[0] == "lost: step 3 has not ended"
    assert engine.told[1:-1] == ["lost: rank 0 has died"] * 2
    supervisor.end_group("rank 1 has died")
    wait_for(lambda: engine.told[-1] != "resume")
    assert "rank 1 has died" in engine.told[-1] and "ended 3 times" in engine.told[-1]
    assert engine.told[-1].startswith("failed: ") and len(Group.made) == 3


def test_ranks_that_die_while_the_engine_is_made_are_news_to_it(start):
    supervisor, engine = start(READY, READY), Told()
    supervisor.start()
    supervisor.end_group("rank 1 has died")
    wait_for(lambda: len(Group.made) == 2)
    supervisor.give_engine(engine)
    wait_for(lambda: engine.told == ["lost: rank 1 has died", "resume"])


def test_ranks_that_are_not_like_the_first_serve_nobody(start):
    other = READY._replace(vocab_size=9)
    supervisor, engine = start(READY, other, other), Told()
    supervisor.start()
    supervisor.give_engine(engine)
    supervisor.end_group("rank 1 has died")
    wait_for(lambda: engine.told and engine.told[-1].startswith("failed: "))
    assert "not like the first" in engine.told[-1] and "resume" not in engine.told


def test_a_refusal_at_the_first_start_is_not_tried_again(start):
    with pytest.raises(RanksRefused, match="no such card"):
        start(RanksRefused("no such card")).start()
    assert len(Group.made) == 1
    with pytest.raises(RanksLost, match="ended 3 times"):
        start(*[RanksLost("rank 0 has died")] * 3).start()


def test_one_that_is_stopped_before_there_is_an_engine_ends(start):
    supervisor = start(READY, READY)
    supervisor.start()
    supervisor.end_group("rank 1 has died")
    wait_for(lambda: len(Group.made) == 2)


def start_two(monkeypatch: pytest.MonkeyPatch, *script: Ready | Exception) -> list[Supervisor]:
    monkeypatch.setattr(module, "RankProcesses", Group)
    Group.script, Group.made = list(script), []
    config = ServingConfig(model_path="fake", max_restarts=0)
    made = [Supervisor([], config, 2, RemoteRunner(), GroupPlace(name)) for name in "01"]
    try:
        start_groups(made, in_turn=True)
    finally:
        for one in made:
            one.stop()
    return made


def test_groups_start_in_turn_and_must_be_alike(monkeypatch: pytest.MonkeyPatch):
    start_two(monkeypatch, READY, READY._replace(num_blocks=7))
    with pytest.raises(
        RanksRefused, match=r"group 1 is not like group 0: .* on cpu, not .* on cuda"
    ):
        start_two(monkeypatch, READY._replace(device_kind="cuda"), READY)
    with pytest.raises(RanksRefused, match="group 0: no such card"):
        start_two(monkeypatch, RanksRefused("no such card"))
    assert len(Group.made) == 1
    with pytest.raises(RanksLost, match=r"group 1: rank 0 has died; .* ended 1 times"):
        start_two(monkeypatch, READY, RanksLost("rank 0 has died"))
