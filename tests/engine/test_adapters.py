"""LoRA adapters in the engine: who runs with which, whose blocks are whose, who may leave when."""

from __future__ import annotations

import time

import pytest

from autotp_serving.engine import EngineError
from autotp_serving.request import AdapterError, Request, SamplingParams
from tests.engine.test_engine import Bench
from tests.fakes import ByteTokenizer, FakeRunner

PROMPT = "the same long beginning of several blocks, "


class AdapterBench(Bench):
    def __init__(self, **settings) -> None:
        super().__init__(enable_lora=True, **settings)

    def load(self, name: str, path: str | None = None):
        future = self.engine.load_adapter(name, path or f"/adapters/{name}")
        self.engine.step()
        return future.result(timeout=0)

    def unload(self, name: str) -> None:
        future = self.engine.unload_adapter(name)
        self.engine.step()
        future.result(timeout=0)

    def ask(self, request_id: str, adapter=None, max_tokens: int = 40) -> None:
        tokens = tuple(ByteTokenizer().encode(PROMPT))
        params = SamplingParams(max_tokens=max_tokens)
        self.engine.submit(Request(request_id, tokens, params, time.monotonic(), adapter=adapter))


def test_neighbours_prefixes_and_answers_are_each_adapters_own(max_in_flight: int) -> None:
    bench = AdapterBench()
    one, other = bench.load("one"), bench.load("other")
    alone = {}
    for adapter in (None, one, other):
        name = f"alone {adapter and adapter.name}"
        bench.ask(name, adapter)
        bench.run()
        assert bench.last(name).num_cached_tokens == 0, "another's blocks"
        alone[adapter] = bench.text(name)
    assert len(set(alone.values())) == 3
    for number, adapter in enumerate((one, None, other, one, None)):
        bench.ask(str(number), adapter)
    bench.run()
    for number, adapter in enumerate((one, None, other, one, None)):
        assert bench.text(str(number)) == alone[adapter]
        assert bench.last(str(number)).num_cached_tokens == len(PROMPT) // 16 * 16
    assert bench.runner.batches[-1].adapters == [1, 0, 2, 1, 0]


def test_an_adapter_that_is_unloaded_stays_for_those_that_run() -> None:
    bench = AdapterBench(max_loras=1)
    adapter = bench.load("one")
    bench.ask("running", adapter)
    bench.engine.step()
    bench.unload("one")
    with pytest.raises(EngineError, match="unloaded"):
        bench.ask("late", adapter)
    with pytest.raises(AdapterError, match="--max-loras"):
        bench.load("two")
    bench.run()
    assert bench.last("running").finish_reason == "length"
    assert bench.runner.adapters == {}
    # The same name, folder and slot again, and yet nothing of before is taken for its own.
    bench.ask("again", bench.load("one"))
    bench.run()
    assert bench.last("again").num_cached_tokens == 0


def test_what_cannot_be_loaded_or_unloaded_is_refused() -> None:
    bench = AdapterBench(max_loras=2)
    bench.load("one")
    for name, path, reason in (
        ("one", "/elsewhere", "taken"),
        ("fake", "/adapters/fake", "taken"),  # the model's own
        ("two words", "/adapters/two", "without spaces"),
        ("bad", "bad", "no adapter"),
    ):
        with pytest.raises(AdapterError, match=reason):
            bench.load(name, path)
    with pytest.raises(AdapterError, match="no adapter is loaded"):
        bench.unload("two")
    bench.load("two")
    assert [one.name for one in bench.engine.adapters.loaded] == ["one", "two"]
    bare = Bench()
    future = bare.engine.load_adapter("one", "/adapters/one")
    bare.engine.step()
    with pytest.raises(AdapterError, match="--enable-lora"):
        future.result(timeout=0)


def test_new_ranks_get_the_adapters_and_requests_go_on() -> None:
    bench = AdapterBench()
    kept, lost = bench.load("kept"), bench.load("lost")
    bench.ask("alone", kept)
    bench.run()
    bench.ask("kept", kept)
    bench.ask("lost", lost)
    bench.engine.step()
    bench.engine.lose("rank 0 has died")
    bench.engine.step()
    fresh = FakeRunner()
    load = fresh.load_adapter

    def load_what_is_there(slot: int, path: str) -> None:
        load(slot, "bad" if path.endswith("lost") else path)

    fresh.load_adapter = load_what_is_there

    def attach() -> None:
        bench.engine._runner = fresh

    bench.engine.resume(attach)
    bench.run()
    assert bench.text("kept") == bench.text("alone")
    assert bench.last("lost").finish_reason == "error"
    assert "'lost' is lost" in bench.last("lost").error
    assert [one.name for one in bench.engine.adapters.loaded] == ["kept"]
