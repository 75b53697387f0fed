"""Who is next: sequences that wait, taken from one tenant after another. Rank 0 only.

A tenant is whoever shows the same API key. Within a tenant, first come, first served; without
keys all are one tenant, and this is a plain queue. Those that ran already and lost their blocks
go before everyone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from autotp_serving.engine.sequence import Sequence


class WaitingQueue:
    """Round robin over tenants; every call but `remove` is O(1).

    The head stays the same until it is taken, whoever arrives, so that one who waits for room is
    not overtaken for ever.
    """

    def __init__(self) -> None:
        self._preempted: deque[Sequence] = deque()
        self._of_tenant: dict[str, deque[Sequence]] = {}  # in order of turns
        self._len = 0

    def __len__(self) -> int:
        return self._len

    def __iter__(self) -> Iterator[Sequence]:
        """All that wait, tenant by tenant."""
        yield from self._preempted
        for queue in self._of_tenant.values():
            yield from queue

    @property
    def head(self) -> Sequence:
        """The next to run; raises StopIteration when nobody waits."""
        return next(iter(self))

    def append(self, sequence: Sequence) -> None:
        """Queue an arrival behind its tenant's others."""
        self._of_tenant.setdefault(sequence.request.tenant, deque()).append(sequence)
        self._len += 1

    def put_back(self, sequence: Sequence) -> None:
        """Queue a preempted sequence before all others."""
        self._preempted.appendleft(sequence)
        self._len += 1

    def adopt(self, sequence: Sequence) -> None:
        """Queue a sequence of another queue: behind those that ran already if it did, too."""
        if sequence.num_preemptions:
            self._preempted.append(sequence)
            self._len += 1
        else:
            self.append(sequence)

    def pop(self) -> Sequence:
        """Take the head; its tenant's next turn comes after all others'."""
        self._len -= 1
        if self._preempted:
            return self._preempted.popleft()
        tenant = next(iter(self._of_tenant))
        queue = self._of_tenant.pop(tenant)
        sequence = queue.popleft()
        if queue:
            self._of_tenant[tenant] = queue
        return sequence

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it is. Raises ValueError when it does not wait."""
        if sequence in self._preempted:
            self._preempted.remove(sequence)
        else:
            tenant = sequence.request.tenant
            queue = self._of_tenant.get(tenant, deque())
            queue.remove(sequence)
            if not queue:
                del self._of_tenant[tenant]
        self._len -= 1
