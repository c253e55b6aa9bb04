"""Metric names keep to Prometheus' conventions, and the Grafana dashboard asks for names and labels that exist."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from coordinator_cases import FakeWorker, Server
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

ROOT = Path(__file__).parents[2]
DASHBOARD = json.loads((ROOT / "deploy" / "grafana" / "fusion.json").read_text())


@pytest.fixture
async def families(server: Server) -> list[Metric]:
    async with FakeWorker(server, "a") as worker:
        worker.pause_after = 2
        job = await server.submit()
        await server.until(job["id"], lambda shown: shown["step"] == 2)
        _, page = await server.call("GET", "/metrics")
    return list(text_string_to_metric_families(page.decode()))


async def test_names_keep_to_the_conventions(families: list[Metric]) -> None:
    assert families
    for family in families:
        assert re.fullmatch(r"fusion_(build|coordinator|worker|job)_[a-z_]+", family.name), family.name
        assert family.documentation.endswith("."), family.name
        assert family.type in ("counter", "gauge"), family.name
        # The parser takes `_total` off a counter's name; whatever else has it is no counter.
        assert all(sample.name.endswith("_total") == (family.type == "counter") for sample in family.samples), (
            family.name
        )
        assert not re.search(r"_(ms|milliseconds|kb|mb|percent|count)$", family.name), family.name


async def test_the_dashboard_asks_for_what_there_is(families: list[Metric]) -> None:
    labels = {sample.name: set(sample.labels) for family in families for sample in family.samples}
    expressions = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
    expressions += [v["query"]["query"] for v in DASHBOARD["templating"]["list"] if v["type"] == "query"]
    asked = {name for expression in expressions for name in re.findall(r"\bfusion_\w+", expression)}
    assert asked <= labels.keys()
    for expression in expressions:
        for name, wanted in re.findall(r"(fusion_\w+)\{(\w+)=", expression):
            assert wanted in labels[name], expression
    for name in {name for name in labels if name.endswith("_total")} & asked:
        for expression in (text for text in expressions if name in text):
            assert re.search(rf"(rate|increase)\({name}", expression), f"{expression}: a counter without a rate"
    assert {"fusion_job_loss", "fusion_job_sent_bytes_total", "fusion_coordinator_workers"} <= asked


def test_panels_have_places_of_their_own() -> None:
    cells = set()
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(ids) == len(set(ids))
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert (x, y) not in cells, panel["title"]
                cells.add((x, y))


async def test_the_page_of_the_metrics_lists_them_all(families: list[Metric]) -> None:
    text = (ROOT / "docs" / "monitoring.md").read_text()
    listed = dict(re.findall(r"^\| `(fusion_\w+)` \| (\w+)", text, re.MULTILINE))
    exported = {f"{family.name}_total" if family.type == "counter" else family.name: family.type for family in families}
    assert listed == exported
