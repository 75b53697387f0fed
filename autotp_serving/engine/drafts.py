"""Which sequences run guessed tokens along with their next one, and how many. Rank 0 only.

Speculative decoding after Leviathan et al. 2023, with guesses that cost nothing to make. A step
verifies a sequence's drafts beside each other and keeps those that it would have chosen anyway, so
text does not depend on them; what they cost is a wider step, and where steps overlap that they no
longer do. So a draft runs where the tokens that it is expected to bring are worth that, by what was
measured of both. Past 250 lines, as what is measured, expected and chosen are one rule.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

from autotp_serving.engine.batch_builder import Step
from autotp_serving.engine.model_drafts import ModelDrafts, Reading
from autotp_serving.engine.ngram_index import NgramIndex
from autotp_serving.engine.sequence import Sequence

FIRST_ACCEPTANCE = 0.5
"""Share of drafts that are accepted, as long as nobody knows."""

MEMORY = 0.95
"""Weight of what a sequence's drafts came to so far, from one time to the next."""

MARGIN = 1.15
"""By how much a draft must be worth more than its cost, as both are estimates."""

FIRST_MARGIN, WAITING_MARGIN = 1.4, 1.0
"""The same of all drafts of a step and its wait: for the first time, and while it goes on."""

PLAIN_INTERVAL = 32
"""Steps with drafts after which one without is measured."""

MIN_INTERVAL, MAX_INTERVAL = 8, 256
"""Steps after which a sequence whose drafts are not worth it has one all the same, as texts change:
at first and at last, for it grows with each that is refused."""

NUM_PLAIN = 3
"""Steps of so many sequences that are measured before any has drafts."""

PLAIN_SHARE, DRAFT_SHARE = 0.3, 0.1
"""Weights of a measured time, and of what drafts cost in it, beside those before."""

WAITING_INTERVAL = 128
"""The same where drafts wait for the tokens before them: of such steps several go without."""

NUM_PLAIN_AFTER = 2
"""How many of those that follow it go without, until steps overlap again."""

MOST_TRIALS = 0.01
"""Share of the time that may go into trials that have to wait."""

LARGEST_GROWTH = 1.25
"""Of a step's time over what was expected; more is taken for a pause of the machine."""

FIRST_COST = 0.5
"""What a draft is taken to cost of a sequence's share of a step, as long as nobody knows: so much
that only one is tried."""


MAX_FORCED = 16
"""Most tokens that must come, as a structured output says, and run ahead in one step."""

TRIAL = -1
"""For a number of drafts: one, if no sequence was tried in MIN_INTERVAL steps."""

TRIAL_SHARE = 0.02
"""Of all time, for trials of a draft model, which may have much to read for one."""

MAX_DEBT = 100.0
"""Steps that trials may have taken in advance."""


class DraftHistory:
    """What became of one sequence's drafts.

    Args:
        acceptance: share of drafts that is expected to be accepted.

    Attributes:
        index: where drafts are looked up; None before the first time.
        num_steps_without: steps since it had drafts.
        interval: after how many it is to have one.
        guess: where a token is not known yet: its place, and which is expected.
        forced: tokens that must come next.
        reading: what a draft model has of it.
    """

    def __init__(self, acceptance: float) -> None:
        self.index: NgramIndex | None = None
        self.forced: list[int] = []
        self.reading = Reading()
        self.num_steps_without = self.interval = MIN_INTERVAL  # the first is tried at once
        self._accepted, self._refused = acceptance, 1.0 - acceptance
        self.guess: tuple[int, int] | None = None

    @property
    def acceptance(self) -> float:
        """Share of drafts that is expected to be accepted, each after those before it."""
        return self._accepted / (self._accepted + self._refused)

    def add(self, num_drafts: int, num_accepted: int) -> None:
        """Take note of a step; drafts after the first that was refused tell nothing."""
        self._accepted = MEMORY * self._accepted + num_accepted
        self._refused = MEMORY * self._refused + (num_accepted < num_drafts)
        if num_accepted:
            self.interval = max(MIN_INTERVAL, self.interval // 2)
        else:
            self.interval = min(MAX_INTERVAL, 2 * self.interval)


class StepCosts:
    """What steps of so many sequences take without drafts, and what a draft adds to any.

    Attributes:
        wait: seconds that a step takes longer where the next one waits for its tokens.
    """

    def __init__(self) -> None:
        self.wait = 0.0
        self._num_waited = 0
        self._plain: dict[int, float] = {}
        self._num_plain: Counter[int] = Counter()
        self._draft = [0.0, 0.0]  # looked up or forced, and guessed by a model
        self._num_drafted = [0, 0]

    def add(
        self,
        num_seqs: int,
        num_drafts: int,
        seconds: float,
        *,
        waited: bool = False,
        by_model: bool = False,
    ) -> None:
        """Take note of a step in which all sequences decoded.

        Args:
            waited: the next began only once its tokens were known, though steps may overlap.
            by_model: a model may have guessed for it.
        """
        plain = self._plain.get(num_seqs)
        if plain is not None and self._num_drafted[by_model]:
            wait = self.wait * (waited or num_drafts > 0)
            expected = plain + wait + num_drafts * self._draft[by_model]
            seconds = min(seconds, LARGEST_GROWTH * expected)
        if num_drafts == 0 and not waited:
            self._num_plain[num_seqs] += 1
            share = max(PLAIN_SHARE, 1 / self._num_plain[num_seqs])
            self._plain[num_seqs] = seconds * share + (plain or 0.0) * (1 - share)
        elif num_drafts == 0 and plain is not None:
            self._num_waited += 1
            share = max(DRAFT_SHARE, 1 / self._num_waited)
            # Neither the host nor the device takes longer than the step of both together.
            wait = min(max(0.0, seconds - plain), plain)
            self.wait = wait * share + self.wait * (1 - share)
        elif plain is not None:
            self._num_drafted[by_model] += 1
            share = max(DRAFT_SHARE, 1 / self._num_drafted[by_model])
            cost = (seconds - plain - self.wait) / num_drafts
            before = self._draft[by_model]
            self._draft[by_model] = max(0.0, cost * share + before * (1 - share))

    def find(self, num_seqs: int, *, by_model: bool = False) -> tuple[float, float, float] | None:
        """Seconds of a step without drafts, of a draft that must come, and of one that is guessed;
        None if the first is not known.
        """
        if self._num_plain[num_seqs] < NUM_PLAIN:
            return None
        plain = self._plain[num_seqs]
        first = FIRST_COST * plain / num_seqs
        costs = [
            cost if count else first
            for cost, count in zip(self._draft, self._num_drafted, strict=True)
        ]
        return plain, costs[False], costs[by_model]


class Drafter:
    """Proposes drafts for the sequences of a step, and learns from what came of them.

    Args:
        max_drafts: most drafts of one sequence in a step; 0 for none ever.

    Attributes:
        num_drafts: times that a sequence had drafts.
        num_draft_tokens, num_accepted_tokens: drafts that ran, and those that were accepted.
        look_up: gives up to so many drafts for a sequence.
        plain_only: no drafts for sequences with penalties or structured output.
    """

    def __init__(self, max_drafts: int) -> None:
        self.num_drafts = self.num_draft_tokens = self.num_accepted_tokens = 0
        self.look_up: Callable[[Sequence, int], list[int]] = _look_up
        self.plain_only = False
        self._max_drafts = max_drafts
        self._model: ModelDrafts | None = None
        self._costs = StepCosts()
        self._accepted, self._refused = FIRST_ACCEPTANCE, 1.0 - FIRST_ACCEPTANCE
        self._num_steps_with = self._num_until_trial = self._num_plain_left = 0
        self._waits_for_trial = False
        self._has_trials, self._trial_seconds, self._read_seconds = False, 0.0, 0.0

    def use_model(self, model: ModelDrafts) -> None:
        """Have a model guess from now on, in place of looking up."""
        self._model = model
        self.look_up = model.look_up

    def propose(
        self,
        sequences: list[Sequence],
        num_left: int,
        has_room: Callable[[Sequence, int], bool],
    ) -> dict[Sequence, list[int]]:
        """Choose drafts for some of the sequences that decode in the next step.

        None in the first step of a new sequence, which is measured: those before it may have had
        longer contexts, and so slower steps.

        Args:
            num_left: most drafts in all.
            has_room: finds blocks for so many drafts of a sequence, or says that there are none.
        """
        if not self._max_drafts:
            return {}
        if self._model is not None:
            self._model.has_caught_up = self._model.has_guessed = self._has_trials = False
        costs = self._find_costs(sequences)
        if costs is None:
            return {}
        self._num_until_trial -= 1
        lens = list(self._choose_lens(sequences, *costs))
        if self._model is not None:
            self._trial_seconds += TRIAL_SHARE * costs[0]
            self._model.prepare(self._list_guessed(lens, num_left), has_room)
        num_trials = 0
        drafts: dict[Sequence, list[int]] = {}
        for sequence, wanted in lens:
            is_trial = wanted == TRIAL
            if is_trial and self._model is None and (num_trials or self._num_until_trial > 0):
                continue
            wanted = min(abs(wanted), num_left)
            found = self._find_drafts(sequence, wanted) if wanted else []
            if found and has_room(sequence, len(found)):
                _history_of(sequence).num_steps_without = 0
                drafts[sequence] = found
                num_trials += is_trial
                num_left -= len(found)
        if num_trials:
            self._num_until_trial = MIN_INTERVAL
        if self._waits_for_trial:
            spent = self._costs.wait + sum(map(len, drafts.values())) * costs[2]
            self._num_until_trial = max(MIN_INTERVAL, round(spent / costs[0] / MOST_TRIALS))
        elif self._costs.wait:
            counts = {sequence: len(found) for sequence, found in drafts.items()}
            if not self._is_worth_waiting(counts, len(sequences), *costs, WAITING_MARGIN):
                drafts = {}  # the blocks are for the tokens after the next
        self._waits_for_trial = False
        self._num_steps_with += bool(drafts)
        return drafts

    def wants_tokens(self, sequences: list[Sequence], num_left: int) -> bool:
        """Whether drafts of the next step are worth waiting for the tokens in flight.

        What is known tells nearly whether there will be some, as a quotation mostly goes on. What
        it says of the token in flight is a draft that costs nothing: acceptance is learned so.

        Args:
            sequences: those that would decode in the next step.
            num_left: most drafts in all.
        """
        if not self._max_drafts or num_left <= 0:
            return False
        costs = self._find_costs(sequences)
        quoting = [sequence for sequence in sequences if self._foretells(sequence)]
        if costs is None:
            return False
        if self._num_plain_left:
            self._num_plain_left -= 1
            return False
        self._num_until_trial -= 1
        wanted = dict(self._choose_lens(sequences, *costs))
        lens = {one: wanted[one] for one in quoting if wanted.get(one)}
        if not self._costs.wait:
            return bool(lens)
        histories = map(_history_of, lens)
        is_due = any(one.num_steps_without >= one.interval for one in histories)
        self._waits_for_trial = is_due and self._num_until_trial <= 0
        lens = {one: count for one, count in lens.items() if count != TRIAL}
        worth_it = self._is_worth_waiting(lens, len(sequences), *costs, FIRST_MARGIN)
        self._waits_for_trial = self._waits_for_trial and not worth_it
        return worth_it or self._waits_for_trial

    def add_outcome(self, sequence: Sequence, num_drafts: int, num_accepted: int) -> None:
        """Take note of what a step did with a sequence's drafts."""
        self.num_drafts += 1
        self.num_draft_tokens += num_drafts
        self.num_accepted_tokens += num_accepted
        if not _history_of(sequence).forced:  # those tell nothing
            self._learn(sequence, num_drafts, num_accepted)

    def add_step(self, step: Step, seconds: float, *, waited: bool = False) -> None:
        """Take note of how long a step lasted, unless it ran more of a prompt.

        Args:
            waited: the next one began only once its tokens were known.
        """
        if not self._max_drafts:
            return
        num_seqs, num_drafts = len(step.sampled), sum(step.batch.num_drafts)
        is_decode = step.num_tokens == num_seqs + num_drafts
        if self._model is not None and self._has_trials and is_decode:
            self._pay_for_trials(self._model, num_seqs, seconds)
        is_typical = self._model is None or not self._model.has_caught_up
        if is_typical and is_decode:
            by_model = self._model is not None and self._model.has_guessed
            self._costs.add(num_seqs, num_drafts, seconds, waited=waited, by_model=by_model)
            if not num_drafts and not waited:
                self._num_steps_with = 0

    def _find_costs(self, sequences: list[Sequence]) -> tuple[float, float, float] | None:
        """What `StepCosts.find` tells, with the wait; None if a step without is to be measured."""
        new = [sequence for sequence in sequences if sequence.drafts is None]
        for sequence in new:
            sequence.drafts = DraftHistory(self._accepted / (self._accepted + self._refused))
        costs = self._costs.find(len(sequences), by_model=self._model is not None)
        interval = WAITING_INTERVAL if self._costs.wait else PLAIN_INTERVAL
        if costs is None or new or self._num_steps_with >= interval:
            self._num_steps_with = 0
            self._num_plain_left = NUM_PLAIN_AFTER
            return None
        return costs[0] + self._costs.wait, *costs[1:]

    def _is_worth_waiting(
        self,
        lens: dict[Sequence, int],
        num_seqs: int,
        seconds: float,
        forced_cost: float,
        cost: float,
        margin: float,
    ) -> bool:
        """Whether all these drafts together are worth that steps do not overlap."""
        num_tokens, more_seconds = 0.0, self._costs.wait
        for sequence, count in lens.items():
            history = _history_of(sequence)
            more_seconds += count * (forced_cost if history.forced else cost)
            acceptance = 1.0 if history.forced else history.acceptance
            num_tokens += sum(acceptance**place for place in range(1, count + 1))
        return num_tokens * (seconds - self._costs.wait) > margin * more_seconds * num_seqs

    def _foretells(self, sequence: Sequence) -> bool:
        """Whether what is known of a sequence foretells tokens after the one in flight."""
        if self._find_most(sequence) <= 0:
            return False
        self._check_guess(sequence)
        found = self.look_up(sequence, 2)
        if found:
            _history_of(sequence).guess = sequence.num_tokens, found[0]
        return len(found) > 1

    def _check_guess(self, sequence: Sequence) -> None:
        """Take note of what became of the guess before, once that is known."""
        history = _history_of(sequence)
        if history.guess is not None and history.guess[0] < sequence.num_tokens:
            place, token = history.guess
            history.guess = None
            self._learn(sequence, 1, int(sequence.token_ids[place] == token))

    def _learn(self, sequence: Sequence, num_drafts: int, num_accepted: int) -> None:
        _history_of(sequence).add(num_drafts, num_accepted)
        self._accepted = 0.98 * self._accepted + 0.02 * num_accepted
        self._refused = 0.98 * self._refused + 0.02 * (num_accepted < num_drafts)

    def _choose_lens(
        self, sequences: list[Sequence], plain: float, forced_cost: float, cost: float
    ) -> Iterable[tuple[Sequence, int]]:
        """How many drafts are worth it for each; the first of an interval is only a trial.

        The drafts with the best prospects come first. Each is worth it while the tokens that it is
        expected to bring, in the time that it takes, are more than the step gives without it.
        """
        lens: dict[Sequence, int] = {}
        prospects: list[tuple[float, int, Sequence, float]] = []
        worth_it = MARGIN * cost * len(sequences) / plain
        for place, sequence in enumerate(sequences):
            most = self._find_most(sequence)
            if most <= 0:
                continue
            history = _history_of(sequence)
            chance = acceptance = history.acceptance
            if history.forced:
                prospects += [(1.0, -place, sequence, forced_cost)] * len(history.forced)
            elif acceptance > worth_it:
                for _ in range(most):
                    prospects.append((chance, -place, sequence, cost))
                    chance *= acceptance
            elif history.num_steps_without >= history.interval:
                lens[sequence] = TRIAL
            history.num_steps_without += 1
        num_tokens, seconds = float(len(sequences)), plain
        for chance, _, sequence, price in sorted(prospects, key=lambda one: one[:2], reverse=True):
            if chance * seconds <= MARGIN * price * num_tokens:
                continue
            lens[sequence] = lens.get(sequence, 0) + 1
            num_tokens += chance
            seconds += price
        return lens.items()

    def _find_most(self, sequence: Sequence) -> int:
        """Most drafts that the sequence can use now; finds tokens that must come."""
        num_tokens = sequence.num_output_tokens + sequence.num_pending_tokens
        left = sequence.params.max_tokens - num_tokens - 1
        depends = sequence.guide is not None or sequence.params.has_penalties
        if depends and (self.plain_only or sequence.num_pending_tokens):
            return 0
        if sequence.guide is not None:
            forced = sequence.guide.look_ahead([], min(left, MAX_FORCED))
            _history_of(sequence).forced = forced
            if forced:
                return len(forced)
        return min(self._max_drafts, left)

    def _list_guessed(
        self, lens: list[tuple[Sequence, int]], num_left: int
    ) -> list[tuple[Sequence, int]]:
        """Who is to have guesses of a model, and how many: trials as far as there is time for them.

        They are made together, as a model guesses for several in the time that it takes for one.
        """
        found = []
        self._has_trials, seconds = False, self._trial_seconds
        for sequence, wanted in lens:
            history = _history_of(sequence)
            if history.forced:
                continue
            if wanted == TRIAL:
                num_unread = sequence.num_tokens - history.reading.num_read
                seconds -= num_unread * self._read_seconds
                if seconds < 0:
                    continue
                self._has_trials = True
            count = min(abs(wanted), num_left)
            num_left -= count
            if count:
                found.append((sequence, count))
        return found

    def _pay_for_trials(self, model: ModelDrafts, num_seqs: int, seconds: float) -> None:
        """Take what a step with trials lasted longer off the time that there is for them."""
        plain = (self._costs.find(num_seqs) or (seconds,))[0]
        spent = max(0.0, seconds - plain)
        self._trial_seconds = max(self._trial_seconds - spent, -MAX_DEBT * plain)
        price = spent / max(1, model.num_read)
        # More is taken for a pause of the machine.
        self._read_seconds = min(price, LARGEST_GROWTH * (self._read_seconds or price))

    def _find_drafts(self, sequence: Sequence, count: int) -> list[int]:
        """Up to so many, with which a structured output can go on."""
        forced = _history_of(sequence).forced
        if forced:
            return forced[:count]
        guesses = self.look_up(sequence, count)
        if sequence.guide is None or not guesses:
            return guesses
        return sequence.guide.look_ahead(guesses, count)


def _history_of(sequence: Sequence) -> DraftHistory:
    assert sequence.drafts is not None, "its first step had no drafts"
    return sequence.drafts


def _look_up(sequence: Sequence, count: int) -> list[int]:
    history = _history_of(sequence)
    if history.index is None:
        history.index = NgramIndex(sequence.num_prompt_tokens + sequence.params.max_tokens)
    return history.index.look_up(sequence.token_ids, count)
