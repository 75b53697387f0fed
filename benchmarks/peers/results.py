"""Results of one or several sittings: what a file holds, and how sittings come together. No rank.

A report is one run of the command; each of its sittings sets our rows against one of the peer's.
Sittings that measured the same versions on the same machine and against the same row of the peer
are one: their rounds are put together and the medians taken anew.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

QUIET = 0.05
"""A round in which others used more of all cores counts only where there is none better."""

Round = Mapping[str, float]
"""A round's figures, and under "others" the share of all cores that everybody else used."""


@dataclass(frozen=True)
class Row:
    """One server in one table.

    Attributes:
        disturbed: tasks of which every round was disturbed.
    """

    name: str
    figures: Mapping[str, float]
    disturbed: Sequence[str] = ()


@dataclass(frozen=True)
class Table:
    """Our rows and one of the peer's, which comes last."""

    conditions: tuple[str, str, str, str]  # machine, our commit, the peer's versions, shape
    dates: Sequence[str]
    commands: Sequence[str]
    rows: Sequence[Row]


def medians(rounds: Sequence[Round]) -> dict[str, float]:
    """The median of each figure, over the undisturbed rounds if there are any."""
    quiet = [one for one in rounds if one["others"] <= QUIET] or rounds
    return {
        name: statistics.median(one[name] for one in quiet)
        for name in (quiet[0] if quiet else ())
        if name != "others"
    }


def merge_reports(reports: Sequence[Mapping[str, Any]]) -> list[Table]:
    """A table for each row of a peer, in the order of the reports."""
    groups: dict[tuple[tuple[str, ...], str], list[tuple[Mapping[str, Any], list[Any]]]] = {}
    for report in reports:
        versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
        conditions = (report["machine"], report["ours"], versions, report["shape"])
        for sitting in report["sittings"]:
            groups.setdefault((conditions, sitting[-1]["name"]), []).append((report, sitting))
    tables = []
    for (conditions, peer), members in groups.items():
        records = [record for _, sitting in members for record in sitting]
        ours = dict.fromkeys(one["name"] for one in records if one["name"] != peer)
        tables.append(
            Table(
                conditions,
                sorted({report["date"] for report, _ in members}),
                list(dict.fromkeys(report["command"] for report, _ in members)),
                [
                    merge_rows([one for one in records if one["name"] == name])
                    for name in [*ours, peer]
                ],
            )
        )
    return tables


def merge_rows(records: Sequence[Mapping[str, Any]]) -> Row:
    """One server's records of several sittings as one row."""
    rounds: dict[str, list[Round]] = {}
    for record in records:
        for task, more in record["rounds"].items():
            rounds.setdefault(task, []).extend(more)
    figures: dict[str, float] = {}
    for more in rounds.values():
        figures |= medians(more)
    disturbed = [
        task for task, more in rounds.items() if more and min(one["others"] for one in more) > QUIET
    ]
    memory = {"memory_mib": max(record["memory_mib"] for record in records)}
    return Row(records[0]["name"], figures | memory, disturbed)
