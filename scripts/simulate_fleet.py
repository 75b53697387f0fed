"""What many replicas do under one load, by how requests are shared out, from measured step times.

    python scripts/simulate_fleet.py --replicas 10 100 --turns-per-second 4 8

Conversations arrive by chance; each begins with one of several system prompts and goes on after a
pause when its answer is complete, with all that was said before it in the next prompt. A replica
runs steps as the scheduler does: a token for each sequence, and prompts in what is left of
--max-num-batched-tokens. docs/scale.md has the assumptions and the results.

Past 250 lines, since replica, routers and load mean nothing without each other.
"""

from __future__ import annotations

import argparse
import bisect
import heapq
import itertools
import json
import random
import sys
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

STEP_TIMES = Path(__file__).parents[1] / "docs/measured/cards/step-times.json"
GUESSED_TOKENS = 256
"""Of an answer, by a router that does not know how long it will be."""

LEAST_MATCH = 0.1
"""Of Ray's rule: the least share of a prompt that counts as a match."""


@dataclass(frozen=True)
class StepTimes:
    """Measured times of one replica.

    Attributes:
        context: tokens behind each sequence when decode steps were measured.
        decode: pairs of sequences and seconds, ascending.
        prefill_rate: prompt tokens a second.
        kv_cache_tokens: that fit into its KV cache.
    """

    context: int
    decode: tuple[tuple[int, float], ...]
    prefill_rate: float
    kv_cache_tokens: int

    @classmethod
    def read(cls, path: Path) -> StepTimes:
        found = json.loads(path.read_text())
        decode = sorted((int(size), ms / 1e3) for size, ms in found["decode_ms"].items())
        return cls(
            found["context"], tuple(decode), found["prefill_tokens_per_second"],
            found["kv_cache_tokens"],
        )  # fmt: skip

    def find_seconds(self, num_rows: int, num_context: int, num_prompt: int) -> float:
        """A step's time: rows that decode over so many tokens in all, prompt tokens beside them.

        Between measured sizes, and beyond the last, by a straight line. A row counts as much as its
        context is long in measured ones, but no less than half: weights are multiplied for each.
        """
        seconds = num_prompt / self.prefill_rate
        if num_rows:
            size = max(num_context / self.context, num_rows / 2, 1.0)
            last = bisect.bisect_left(self.decode, (size,), 1, len(self.decode) - 1)
            (low, at_low), (high, at_high) = self.decode[last - 1], self.decode[last]
            seconds += at_low + (size - low) * (at_high - at_low) / (high - low)
        return seconds


@dataclass(frozen=True)
class Load:
    """Conversations; lengths are means of exponential distributions, in tokens."""

    turns_per_second: float = 6.0  # of a replica
    num_turns: float = 6.0
    pause_seconds: float = 20.0
    num_systems: int = 20
    system_tokens: int = 1000
    first_tokens: float = 200.0
    later_tokens: float = 100.0
    answer_tokens: float = 200.0
    longest: int = 4000


@dataclass(slots=True)
class Turn:
    """One request: the end of a conversation so far."""

    arrival: float
    conversation: int
    system: int
    num_prompt: int
    num_answer: int
    num_turns_left: int
    num_cached: int = 0
    num_to_compute: int = 0
    num_estimated: int = 0
    replica: int = -1
    first_token: float = 0.0
    end: float = 0.0


@dataclass(frozen=True)
class Limits:
    """As the server's flags of these names."""

    max_num_seqs: int = 128
    max_num_batched_tokens: int = 4096


class Replica:
    """A group of ranks: its queue, what runs, its prefix cache; the longest unused goes first."""

    def __init__(self, times: StepTimes, load: Load, limits: Limits) -> None:
        self._times, self._load, self._limits = times, load, limits
        self._cache: OrderedDict[tuple[str, int], int] = OrderedDict()
        self._num_kept = 0
        self._waiting: deque[Turn] = deque()
        self._prefilling: deque[Turn] = deque()
        self._decoding: list[tuple[int, int, Turn]] = []  # by the step in which they end
        self._serial = itertools.count()
        self._num_steps = 0
        self._num_context = 0  # tokens behind all rows that decode
        self._num_reserved = 0  # of the KV cache, by what runs
        self._ends_prefill: list[Turn] = []
        self.num_requests = 0
        self.num_left = 0  # tokens, by a router's estimate
        self.is_busy = False

    def count_cached(self, turn: Turn) -> int:
        """Leading tokens of a prompt that need not be computed; the last one always is."""
        system = self._cache.get(("system", turn.system), 0)
        own = self._cache.get(("conversation", turn.conversation), 0) if system else 0
        return min(system + own, turn.num_prompt - 1)

    def has_room(self) -> bool:
        return self.num_requests < self._limits.max_num_seqs

    def add(self, turn: Turn) -> None:
        self.num_requests += 1
        turn.num_estimated = turn.num_prompt - self.count_cached(turn) + GUESSED_TOKENS
        self.num_left += turn.num_estimated
        self._waiting.append(turn)

    def begin_step(self) -> float | None:
        """Seconds of the next step; None where there is nothing to do."""
        self._admit()
        budget = self._limits.max_num_batched_tokens - len(self._decoding)
        num_prompt = 0
        self._ends_prefill = []
        while self._prefilling and budget > 0:
            turn = self._prefilling[0]
            part = min(budget, turn.num_to_compute)
            turn.num_to_compute -= part
            budget -= part
            num_prompt += part
            if turn.num_to_compute:
                break
            self._ends_prefill.append(self._prefilling.popleft())
        if not num_prompt and not self._decoding:
            return None
        return self._times.find_seconds(len(self._decoding), self._num_context, num_prompt)

    def end_step(self, now: float) -> list[Turn]:
        """The requests that have ended with it."""
        self._num_steps += 1
        self._num_context += len(self._decoding)
        ended = []
        while self._decoding and self._decoding[0][0] == self._num_steps:
            turn = heapq.heappop(self._decoding)[2]
            self._num_context -= turn.num_prompt + turn.num_answer - 1
            ended.append(turn)
        for turn in self._ends_prefill:
            turn.first_token = now
            if turn.num_answer == 1:
                ended.append(turn)
                continue
            last = self._num_steps + turn.num_answer - 1
            heapq.heappush(self._decoding, (last, next(self._serial), turn))
            self._num_context += turn.num_prompt
        for turn in ended:
            turn.end = now
            self.num_requests -= 1
            self.num_left -= turn.num_estimated
            self._num_reserved -= turn.num_prompt + turn.num_answer
            self._keep(turn)
        return ended

    def _admit(self) -> None:
        num_running = len(self._decoding) + len(self._prefilling)
        while self._waiting and num_running < self._limits.max_num_seqs:
            turn = self._waiting[0]
            needed = turn.num_prompt + turn.num_answer
            if self._num_reserved + needed > self._times.kv_cache_tokens and num_running:
                return
            self._waiting.popleft()
            self._num_reserved += needed
            num_running += 1
            turn.num_cached = self.count_cached(turn)
            turn.num_to_compute = turn.num_prompt - turn.num_cached
            self._prefilling.append(turn)
            self._evict()

    def _keep(self, turn: Turn) -> None:
        system = min(self._load.system_tokens, turn.num_prompt)
        own = turn.num_prompt + turn.num_answer - system
        kept = {("conversation", turn.conversation): own, ("system", turn.system): system}
        for key, length in kept.items():
            self._num_kept += length - self._cache.pop(key, 0)
            self._cache[key] = length
        self._evict()

    def _evict(self) -> None:
        room = max(0, self._times.kv_cache_tokens - self._num_reserved)
        while self._num_kept > room:
            self._num_kept -= self._cache.popitem(last=False)[1]


Router = Callable[[Turn, Sequence[Replica]], int]


def make_router(name: str, rng: random.Random, system_tokens: int, imbalance: int) -> Router:
    """A way to choose a replica for a request; returns its index."""
    turns = itertools.count()
    seen: list[dict[tuple[str, int], int]] = []  # prompts that each replica was sent, by Ray's rule

    def round_robin(turn: Turn, replicas: Sequence[Replica]) -> int:
        return next(turns) % len(replicas)

    def least_loaded(turn: Turn, replicas: Sequence[Replica]) -> int:
        fewest = min(one.num_requests for one in replicas)
        return rng.choice([i for i, one in enumerate(replicas) if one.num_requests == fewest])

    def prefix_of_head(turn: Turn, replicas: Sequence[Replica]) -> int:
        """As EngineGroups: least to do, what is cached taken off, those with room first."""
        with_room = [i for i, one in enumerate(replicas) if one.has_room()]
        return min(
            with_room or range(len(replicas)),
            key=lambda i: (
                replicas[i].num_left - replicas[i].count_cached(turn),
                replicas[i].num_requests,
            ),
        )

    def prefix_of_ray(turn: Turn, replicas: Sequence[Replica]) -> int:
        """As PrefixCacheAffinityRouter: where most was sent before, unless the load is uneven."""
        seen.extend({} for _ in range(len(replicas) - len(seen)))
        counts = [one.num_requests for one in replicas]
        if max(counts) - min(counts) > imbalance:
            chosen = min(
                rng.sample(range(len(replicas)), min(2, len(replicas))), key=counts.__getitem__
            )
        else:
            matches = [
                of_one.get(("system", turn.system), 0)
                + of_one.get(("conversation", turn.conversation), 0)
                for of_one in seen
            ]
            best = max(matches)
            if best >= LEAST_MATCH * turn.num_prompt:
                among = [i for i, match in enumerate(matches) if match == best]
            else:
                sizes = [sum(of_one.values()) for of_one in seen]
                among = [i for i, size in enumerate(sizes) if size == min(sizes)]
            chosen = min(among, key=counts.__getitem__)
        system = min(turn.num_prompt, system_tokens)
        seen[chosen] |= {
            ("system", turn.system): system,
            ("conversation", turn.conversation): turn.num_prompt - system,
        }
        return chosen

    return {
        "round robin": round_robin,
        "least loaded": least_loaded,
        "prefix, the head's": prefix_of_head,
        "prefix, Ray's": prefix_of_ray,
    }[name]


ROUTERS = ("round robin", "least loaded", "prefix, the head's", "prefix, Ray's")


def simulate(
    router: str,
    num_replicas: int,
    seconds: float,
    times: StepTimes,
    load: Load = Load(),
    limits: Limits = Limits(),
    seed: int = 0,
    imbalance: int = 8,
) -> list[Turn]:
    """All turns that arrived within so many seconds and ended, in the order in which they ended.

    The conversations are those of the seed, whatever the router. Ray's lets a replica be ahead of
    another by so many requests.
    """
    choose = make_router(router, random.Random(seed), load.system_tokens, imbalance)
    replicas = [Replica(times, load, limits) for _ in range(num_replicas)]
    serial = itertools.count()
    events: list[tuple[float, int, Turn | int]] = []  # a turn that arrives, or whose step ends

    def push(when: float, what: Turn | int) -> None:
        heapq.heappush(events, (when, next(serial), what))

    def begin_step(index: int, now: float) -> None:
        duration = replicas[index].begin_step()
        replicas[index].is_busy = duration is not None
        if duration is not None:
            push(now + duration, index)

    rng = random.Random(seed)
    of_conversation: dict[int, random.Random] = {}

    def draw(conversation: int, mean: float) -> int:
        return max(1, min(load.longest, round(of_conversation[conversation].expovariate(1 / mean))))

    rate = load.turns_per_second * num_replicas / load.num_turns
    moment = 0.0
    for conversation in itertools.count():
        moment += rng.expovariate(rate)
        if moment > seconds:
            break
        own = of_conversation[conversation] = random.Random(f"{seed} {conversation}")
        system = min(int(own.paretovariate(1.0)) - 1, load.num_systems - 1)
        num_turns = 1
        while own.random() > 1 / load.num_turns:
            num_turns += 1
        num_prompt = load.system_tokens + draw(conversation, load.first_tokens)
        num_answer = draw(conversation, load.answer_tokens)
        push(moment, Turn(moment, conversation, system, num_prompt, num_answer, num_turns - 1))
    finished = []
    while events:
        now, _, what = heapq.heappop(events)
        if isinstance(what, Turn):
            what.replica = choose(what, replicas)
            replicas[what.replica].add(what)
            if not replicas[what.replica].is_busy:
                begin_step(what.replica, now)
            continue
        for turn in replicas[what].end_step(now):
            finished.append(turn)
            pause = of_conversation[turn.conversation].expovariate(1 / load.pause_seconds)
            num_prompt = (
                turn.num_prompt + turn.num_answer + draw(turn.conversation, load.later_tokens)
            )
            num_answer = draw(turn.conversation, load.answer_tokens)
            if turn.num_turns_left and now + pause < seconds:
                push(
                    now + pause,
                    Turn(
                        now + pause, turn.conversation, turn.system, num_prompt, num_answer,
                        turn.num_turns_left - 1,
                    ),
                )  # fmt: skip
        begin_step(what, now)
    return finished


@dataclass(frozen=True)
class Summary:
    """Of the turns that arrived after the warm-up; seconds, and tokens a second of a replica."""

    num_turns: int
    output_rate: float
    first_token_p50: float
    first_token_p99: float
    token_p99: float
    hit_share: float
    spread: float

    @classmethod
    def of(cls, turns: list[Turn], warm_up: float, seconds: float, num_replicas: int) -> Summary:
        late = [turn for turn in turns if turn.arrival >= warm_up]
        if not any(turn.num_answer > 1 for turn in late):
            raise SystemExit("no answer is long enough to count: raise --seconds")
        window = seconds - warm_up
        done = sum(turn.num_answer for turn in turns if warm_up <= turn.end < seconds)
        first = sorted(turn.first_token - turn.arrival for turn in late)
        between = sorted(
            (turn.end - turn.first_token) / (turn.num_answer - 1)
            for turn in late
            if turn.num_answer > 1
        )
        of_replica = [0] * num_replicas
        for turn in late:
            of_replica[turn.replica] += turn.num_answer + turn.num_prompt - turn.num_cached
        return cls(
            len(late),
            done / window / num_replicas,
            first[len(first) // 2],
            first[len(first) * 99 // 100],
            between[len(between) * 99 // 100],
            sum(turn.num_cached for turn in late) / sum(turn.num_prompt for turn in late),
            max(of_replica) / (sum(of_replica) / num_replicas),
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--replicas", nargs="+", type=int, default=[10, 100])
    parser.add_argument("--turns-per-second", nargs="+", type=float, default=[6.0],
                        help="of a replica, on average")  # fmt: skip
    parser.add_argument("--routers", nargs="+", choices=ROUTERS, default=ROUTERS)
    parser.add_argument("--seconds", type=float, default=300.0, help="simulated")
    parser.add_argument("--warm-up", type=float, default=150.0, help="of them, not counted")
    parser.add_argument("--imbalance", type=int, default=8,
                        help="requests by which Ray's rule lets a replica be ahead")  # fmt: skip
    parser.add_argument("--step-times", type=Path, default=STEP_TIMES)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if not 0 <= options.warm_up < options.seconds or min(options.replicas) < 1:
        parser.error("--warm-up must be less than --seconds, and --replicas at least 1")
    if min(options.turns_per_second) <= 0:
        parser.error("--turns-per-second must be above 0")
    try:
        times = StepTimes.read(options.step_times)
    except (OSError, ValueError, KeyError) as error:
        parser.error(f"--step-times {options.step_times} cannot be read: {error!r}")
    print(
        "| replicas | turns/s each | router | tokens/s each | first token P50, P99, s "
        "| token P99, ms | prompts cached | busiest replica's work |\n" + "|---" * 8 + "|"
    )
    for num_replicas, rate in itertools.product(options.replicas, options.turns_per_second):
        for router in options.routers:
            turns = simulate(
                router, num_replicas, options.seconds, times, Load(rate),
                seed=options.seed, imbalance=options.imbalance,
            )  # fmt: skip
            one = Summary.of(turns, options.warm_up, options.seconds, num_replicas)
            print(
                f"| {num_replicas} | {rate:g} | {router} | {one.output_rate:.0f} "
                f"| {one.first_token_p50:.2f}, {one.first_token_p99:.2f} "
                f"| {one.token_p99 * 1e3:.0f} | {one.hit_share:.0%} | {one.spread:.2f} x mean |",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
