"""The active requests, and whether the queue has room for one more. Rank 0 only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from autotp_serving.request import Request


class QueueFullError(RuntimeError):
    """As many requests wait as may wait; there is room after `num_finishes` others ended."""

    def __init__(self, message: str, num_finishes: int = 1) -> None:
        super().__init__(message)
        self.num_finishes = num_finishes


class ShareFullError(QueueFullError):
    """One tenant holds its share of the queue already; others still get in."""


class ActiveRequests:
    """From a request's submission to its last output. Whoever changes it holds a lock.

    Args:
        max_num_active: most requests that run or wait.
    """

    def __init__(self, max_num_active: int) -> None:
        self._max_num_active = max_num_active
        self._requests: dict[str, Request] = {}
        self._num_of: Counter[str] = Counter()  # by tenant

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        """Those of this moment, so that they may end meanwhile."""
        return iter(tuple(self._requests.values()))

    def get(self, request_id: str) -> Request | None:
        """The request of this id, None if it is not active."""
        return self._requests.get(request_id)

    def add(self, request: Request) -> None:
        """Let a request in.

        Raises:
            QueueFullError: there is no room, at all or for this tenant.
            ValueError: a request with this id is active.
        """
        self._check_room(request.tenant)
        if request.request_id in self._requests:
            raise ValueError(f"request id {request.request_id} is in use")
        self._requests[request.request_id] = request
        self._num_of[request.tenant] += 1

    def remove(self, request: Request) -> None:
        """Forget a request that has had its last output."""
        del self._requests[request.request_id]
        self._num_of[request.tenant] -= 1
        if not self._num_of[request.tenant]:
            del self._num_of[request.tenant]

    def _check_room(self, tenant: str) -> None:
        """Refuse what exceeds the queue, or a tenant's share of it.

        A tenant may hold as many places as are free: one that floods leaves half of them, two
        leave a third (dynamic thresholds, after Choudhury and Hahne 1998). So a newcomer gets in,
        and nobody has to say how many there will be. Where all are one tenant, "", it has all.
        """
        num_free = self._max_num_active - len(self._requests)
        num_held = self._num_of[tenant]  # a Counter adds no key by asking
        if num_free <= 0:
            raise QueueFullError(f"{len(self._requests)} requests run or wait already")
        if tenant and num_held >= num_free:
            raise ShareFullError(
                f"{num_held} requests of this API key run or wait already: that is its share",
                num_held - num_free + 1,
            )
