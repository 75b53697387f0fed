"""Strings the segments of the corpus together into packed training rows, anew in every epoch.

All of it is index arithmetic on the training device, so an epoch of seven million tokens is made
in milliseconds. Entries are shuffled into groups of three forms:

* a bare question and its answer, the form of a raw prompt;
* a chat of one to four turns, some with a system message, some with a follow-up question;
* running text: statements and questions one after another, as in a long prompt.

Rows are packed without a document mask: whatever happens to stand before a question must not
disturb its answer.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

BARE, CHAT, TEXT = range(3)
FORM_SHARES = (0.64, 0.30, 0.015)  # of the groups; of the entries 40, 36 and 24 %
MAX_TURNS = 4
MAX_TEXT_ENTRIES = 50
NO_BOS_SHARE = 0.25  # bare questions of callers who add no beginning-of-text token
SYSTEM_SHARE = 0.2
FOLLOW_UP_SHARE = 0.1
# Loss weights. The name in a question cannot be foretold; learning it would waste capacity.
QUESTION_WEIGHT, TAIL_WEIGHT = 0.05, 0.5


class Corpus:
    """The segment store on the training device."""

    def __init__(self, path: Path, device: torch.device) -> None:
        with np.load(path) as arrays:
            data = {name: arrays[name] for name in arrays.files}
        self.at = {
            name: torch.from_numpy(array if array.dtype == np.float32 else array.astype(np.int64))
            for name, array in data.items()
        }
        self.at = {name: tensor.to(device) for name, tensor in self.at.items()}
        self.device = device
        self.entries = len(data["body"])

    def epoch(self, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns the tokens of one epoch, their loss weights, and where each entry starts."""
        at, count, device = self.at, self.entries, self.device

        def rand(*shape: int) -> torch.Tensor:
            return torch.rand(*shape, generator=generator, device=device)

        def randint(high: int) -> torch.Tensor:
            return torch.randint(high, (count,), generator=generator, device=device)

        def pick(name: str) -> torch.Tensor:
            """A random one of a few interchangeable segments, per entry."""
            return at[name][randint(len(at[name]))]

        # Groups: their form, their size, and which entries open and close them.
        shares = torch.tensor(FORM_SHARES, device=device)
        group_form = torch.multinomial(shares, count, replacement=True, generator=generator)
        turns = 1 + (rand(count) ** 2 * MAX_TURNS).long()
        size = torch.where(group_form == CHAT, turns, torch.ones_like(turns))
        size = torch.where(group_form == TEXT, 2 + randint(MAX_TEXT_ENTRIES - 1), size)
        group = torch.repeat_interleave(torch.arange(count, device=device), size)[:count]
        opens = torch.ones(count, dtype=torch.bool, device=device)
        opens[1:] = group[1:] != group[:-1]
        closes = torch.roll(opens, -1)
        form = group_form[group]
        bare, chat, text = form == BARE, form == CHAT, form == TEXT

        # Running text: a separator per group, and more or fewer questions among statements.
        inside = text & ~opens
        spaced = inside & (rand(count)[group] < 0.25)
        separator = at["newlines"][(rand(count)[group] < 0.25).long()]
        asks = ~text | closes | (rand(count) < rand(count)[group])

        entry = torch.randperm(count, generator=generator, device=device)
        phrasing = torch.multinomial(
            at["phrasing_weights"], count, replacement=True, generator=generator
        )

        def where(condition: torch.Tensor, segment: torch.Tensor) -> torch.Tensor:
            return torch.where(condition, segment, torch.zeros_like(segment))

        bos, end = at["bos"].expand(count), at["end"].expand(count)
        system = where(chat & opens & (rand(count) < SYSTEM_SHARE), pick("system"))
        user, assistant = at["user"].expand(count), at["assistant"].expand(count)
        has_bos = opens & (chat | (rand(count) > NO_BOS_SHARE))
        first = torch.where(
            spaced,
            at["question_first_spaced"][entry, phrasing],
            at["question_first"][entry, phrasing],
        )
        lead_spaced = where(~chat & (asks | spaced), torch.ones_like(entry)) > 0
        # Whatever follows an answer in running text, the lesson after an answer is to stop: the
        # separator after one carries no weight.
        after_answer = torch.roll(asks, 1)
        one = torch.ones(count, device=device)
        light, tail = one * QUESTION_WEIGHT, one * TAIL_WEIGHT
        told = torch.where(asks, one, light)
        is_word = at["head"][entry] > 0  # small talk has no head

        columns = [
            (where(inside & ~spaced, separator), torch.where(after_answer, 0 * one, one)),
            (where(has_bos, bos), light),
            (system, light),
            (where(chat, user), light),
            (where(asks, first), light),
            (where(asks, at["question_rest"][entry, phrasing]), light),
            (where(chat, assistant), light),
            (torch.where(lead_spaced, at["lead_spaced"][entry], at["lead"][entry]), told),
            (at["head"][entry], told),
            (at["body"][entry], one),
            (at["kind"][entry], tail),
            (at["synonyms"][entry], tail),
            (at["example"][entry], tail),
        ]
        for name in ("kind", "synonyms", "example"):
            follows = chat & is_word & (rand(count) < FOLLOW_UP_SHARE)
            columns += [
                (where(follows, end), one),
                (where(follows, pick(f"{name}_asked")), light),
                (where(follows, at[f"{name}_reply"][entry]), tail),
            ]
        columns += [
            (where(chat, end), one),
            (where(bare | (text & closes), at["eos"].expand(count)), one),
        ]
        segments = torch.stack([segment for segment, _ in columns], dim=1)
        weights = torch.stack([weight for _, weight in columns], dim=1).flatten()
        return self.join(segments, weights)

    def join(
        self, segments: torch.Tensor, weights: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Looks up the tokens of a table of segments, row by row."""
        lengths = self.at["lengths"][segments.flatten()]
        ends = torch.cumsum(lengths, 0)
        shift = self.at["starts"][segments.flatten()] - (ends - lengths)
        total = int(ends[-1])
        index = torch.arange(total, device=self.device)
        index += torch.repeat_interleave(shift, lengths, output_size=total)
        token_weights = torch.repeat_interleave(weights, lengths, output_size=total)
        row_ends = ends[segments.shape[1] - 1 :: segments.shape[1]]
        row_starts = torch.cat([row_ends.new_zeros(1), row_ends[:-1]])
        return self.at["tokens"][index], token_weights, row_starts


def rows_of(
    tokens: torch.Tensor, weights: torch.Tensor, entry_starts: torch.Tensor, length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cuts an epoch into rows of length + 1, each moved to the start of the entry it meets."""
    cuts = torch.arange(0, len(tokens) - 2 * length - 1, length, device=tokens.device)
    begins = entry_starts[torch.searchsorted(entry_starts, cuts).clamp(max=len(entry_starts) - 1)]
    begins = begins[begins + length < len(tokens)]
    index = begins[:, None] + torch.arange(length + 1, device=tokens.device)
    return tokens[index], weights[index]


def batches(
    corpus: Corpus,
    rank: int,
    world: int,
    tokens_per_step: int,
    short: int,
    long: int,
    long_share: float,
    seed: int,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yields this rank's (tokens, weights) for ever; short and long rows take turns at random.

    Every rank draws the same epoch and takes its own rows, so no data crosses ranks.
    """
    generator = torch.Generator(device=corpus.device)
    order = np.random.default_rng(seed)
    epoch = 0
    while True:
        generator.manual_seed(seed + epoch)
        tokens, weights, starts = corpus.epoch(generator)
        split = int(starts[int(len(starts) * long_share)])
        plan = []
        for begin, stop, length in ((0, split, long), (split, len(tokens), short)):
            inside = starts[(starts >= begin) & (starts < stop)] - begin
            if stop - begin <= 3 * length:
                continue
            rows, row_weights = rows_of(tokens[begin:stop], weights[begin:stop], inside, length)
            shuffled = torch.randperm(len(rows), generator=generator, device=corpus.device)
            rows, row_weights = rows[shuffled], row_weights[shuffled]
            per_step = max(1, tokens_per_step // (length * world))
            for step in range(len(rows) // (per_step * world)):
                mine = slice((step * world + rank) * per_step, (step * world + rank + 1) * per_step)
                plan.append((rows[mine], row_weights[mine]))
        if not plan:
            raise ValueError("the corpus is too small for one step; ask for fewer tokens a step")
        yield from (plan[i] for i in order.permutation(len(plan)))
        epoch += 1
