"""Make one vector of a prompt's hidden states, or logits of a classifier. Rank 0 only.

Every rank has them after the last norm, so that rank 0 has all it needs. Numbers are float32 from
here on; the mean of a prompt that runs in chunks is of the sum over all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.nn import functional

from autotp_serving.batch import PoolInput
from autotp_serving.worker.logprobs import Fetch


class Pooler:
    """Pools a step's rows, and keeps the sums of prompts that go on.

    Args:
        fetch: begins to copy a tensor to the host.
    """

    def __init__(self, fetch: Fetch) -> None:
        self._fetch = fetch
        self._kept: dict[str, torch.Tensor] = {}

    def pool(
        self, rows: torch.Tensor, pools: Sequence[PoolInput]
    ) -> list[Callable[[], bytes | None]]:
        """Begin to pool.

        Args:
            rows: [num_rows, size] of any floating type, those of all pools one after another.

        Returns:
            For each a function that waits for its vector: see `StepResult.pooled`.
        """
        results: list[Callable[[], bytes | None]] = []
        start = 0
        for one in pools:
            total = rows[start : start + one.num_rows].sum(0, dtype=torch.float32)
            start += one.num_rows
            before = self._kept.pop(one.request_id, None)
            if before is not None and not one.is_first:  # else it was preempted, and runs anew
                total = total + before
            if not one.is_last:
                self._kept[one.request_id] = total
                results.append(lambda: None)
                continue
            if one.pooling.method == "mean":
                total = total / one.num_tokens
            total = total[: one.pooling.dimensions]
            if one.pooling.normalize:
                total = functional.normalize(total, dim=0)
            results.append(self._begin_fetch(total))
        return results

    def release(self, request_id: str) -> None:
        """Forget what is kept for a request."""
        self._kept.pop(request_id, None)

    def _begin_fetch(self, vector: torch.Tensor) -> Callable[[], bytes]:
        fetched = self._fetch(vector)

        def wait() -> bytes:
            found = fetched()
            return found.numpy().tobytes() if bool(found.isfinite().all()) else b""

        return wait
