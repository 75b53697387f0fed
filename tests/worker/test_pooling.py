"""One vector of a prompt's rows, whole or in chunks."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from typing import Any

import pytest
import torch

from autotp_serving.batch import PoolInput
from autotp_serving.request import Pooling, PoolingMethod
from autotp_serving.worker.pooling import Pooler

ROWS = torch.arange(12.0).view(6, 2).bfloat16()


def fetch(tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
    return lambda: tensor


def chunk(method: PoolingMethod, count: int, first: bool, last: bool, **pooling: Any) -> PoolInput:
    return PoolInput("a", Pooling(method, **pooling), count, 6, first, last)


@pytest.mark.parametrize(("method", "counts"), [("mean", (4, 0, 2)), ("cls", (1, 0, 0))])
def test_chunks_give_what_the_whole_gives(method: PoolingMethod, counts: tuple[int, ...]) -> None:
    pooler = Pooler(fetch)
    start, vectors = 0, []
    for index, count in enumerate((2, *counts)):  # the first was preempted after its chunk
        one = chunk(method, count if index else 2, index < 2, index == 3)
        start = 0 if index < 2 else start
        (wait,) = pooler.pool(ROWS[start : start + count], [one])
        start += count
        vectors.append(wait())
    assert vectors[:3] == [None, None, None]
    expected = {"mean": [5.0, 6.0], "cls": [0.0, 1.0]}[method]
    assert array("f", vectors[3]).tolist() == expected


def test_dimensions_are_cut_before_the_length_is_made_one() -> None:
    one = chunk("last", 1, False, True, normalize=True, dimensions=1)
    (wait,) = Pooler(fetch).pool(ROWS[5:], [one])
    assert array("f", wait()).tolist() == [1.0]


def test_what_is_not_finite_is_no_vector() -> None:
    pools = [chunk("last", 1, True, True), chunk("last", 1, True, True)]
    rows = torch.tensor([[1.0, torch.nan], [1.0, 2.0]])
    broken, sound = (wait() for wait in Pooler(fetch).pool(rows, pools))
    assert broken == b"" and array("f", sound).tolist() == [1.0, 2.0]
