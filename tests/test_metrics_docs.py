"""docs/metrics.md and the Grafana dashboard speak of the metrics that there are, and of all."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from autotp_serving.api.metrics import PREFIX, GroupFigures, Latencies, render
from autotp_serving.step_times import RankTimes
from tests.api.service import build_service

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def kinds() -> dict[str, str]:
    """Kind of every metric that the server has, by name without prefix."""
    stats = build_service().engine.engine.stats()
    groups = [GroupFigures(stats, [RankTimes()], True)] * 2
    text = render(groups, Latencies(), {"queue_full": 0}, "m")
    return dict(re.findall(rf"^# TYPE {PREFIX}(\S+) (\S+)$", text, re.MULTILINE))


def test_docs_list_every_metric_with_its_kind(kinds: dict[str, str]) -> None:
    text = (ROOT / "docs" / "metrics.md").read_text()
    assert dict(re.findall(r"^\| `(\w+)` \| (\w+) \|", text, re.MULTILINE)) == kinds


def expressions(node: Any) -> Iterator[str]:
    """Every query of a dashboard."""
    if isinstance(node, dict):
        yield from (node[key] for key in ("expr", "definition") if key in node)
        node = list(node.values())
    if isinstance(node, list):
        for child in node:
            yield from expressions(child)


def test_dashboard_asks_for_metrics_that_exist(kinds: dict[str, str]) -> None:
    dashboard = json.loads((ROOT / "deploy" / "grafana-dashboard.json").read_text())
    samples = set()
    for name, kind in kinds.items():
        suffixes = ("_bucket", "_sum", "_count") if kind == "histogram" else ("",)
        samples |= {name + suffix for suffix in suffixes}
    asked = set()
    for expression in expressions(dashboard):
        asked |= set(re.findall(rf"{PREFIX}(\w+)", expression))
    assert asked and asked <= samples
    shown = {re.sub("_(bucket|sum|count)$", "", name) for name in asked} | asked
    assert set(kinds) <= shown, "metrics that no panel shows"


def test_dashboard_panels_do_not_overlap() -> None:
    dashboard = json.loads((ROOT / "deploy" / "grafana-dashboard.json").read_text())
    taken: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        cells = {
            (place["x"] + dx, place["y"] + dy)
            for dx in range(place["w"])
            for dy in range(place["h"])
        }
        assert place["x"] + place["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(ids) == len(set(ids))
