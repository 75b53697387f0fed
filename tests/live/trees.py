"""Processes of a rank, its children included: how much memory they hold.

A server may work on what clients send in children of its own, whose memory counts as the server's.
"""

from __future__ import annotations

import os
from pathlib import Path


def tree_mib(root: int) -> float:
    """Resident memory in MiB of a process and of all that descend from it.

    Pages that a child shares with its parent count once for each, so this is no less than they
    take.
    """
    return sum(_resident_bytes(pid) for pid in list_tree(root)) / 2**20


def list_tree(root: int) -> list[int]:
    """A process and all that descend from it."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # ended while we looked
            continue
        children.setdefault(int(fields[1]), []).append(int(folder.name))
    found, waiting = [], [root]
    while waiting:
        pid = waiting.pop()
        found.append(pid)
        waiting += children.get(pid, [])
    return found


def _resident_bytes(pid: int) -> int:
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGESIZE")
