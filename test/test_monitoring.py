"""What is shipped for Prometheus and Grafana fits what servers export, and what is documented."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from sglang_hma.top import reading

ROOT = Path(__file__).parent.parent
MONITORING = ROOT / "deploy" / "monitoring"
SERIES = re.compile(r"\b(?:sglang_hma:|sglang:|smg_)\w+")
ROW = re.compile(r"^\| `((?:sglang_hma:)[\w:]+)` \| (counter|gauge|histogram) \|", re.MULTILINE)
HISTOGRAM = ("_bucket", "_sum", "_count")


def documented() -> dict[str, str]:
    """Series of ours with their types."""
    return dict(ROW.findall((ROOT / "docs" / "observability.md").read_text()))


def exposed(name: str, kind: str) -> set[str]:
    """A documented series as a scrape has it."""
    return {name + part for part in HISTOGRAM} if kind == "histogram" else {name}


def dashboard() -> dict[str, Any]:
    return dict(json.loads((MONITORING / "dashboard.json").read_text()))


def queries() -> list[str]:
    """Of the dashboard and of the alerts."""
    panels = [panel for panel in dashboard()["panels"] if panel["type"] != "row"]
    shown = [target["expr"] for panel in panels for target in panel["targets"]]
    variables = [each["query"] for each in dashboard()["templating"]["list"]]
    shown += [each["query"] for each in variables if isinstance(each, dict)]
    groups = yaml.safe_load((MONITORING / "alerts.yml").read_text())["groups"]
    return [*shown, *(rule["expr"] for group in groups for rule in group["rules"])]


def used() -> set[str]:
    """Series that the dashboard, the alerts or top read."""
    return {name for query in queries() for name in SERIES.findall(query)} | set(reading.NAMES)


def test_every_query_reads_something() -> None:
    for query in queries():
        assert SERIES.search(query) or query.startswith("up{"), query


def test_what_is_read_of_ours_is_documented() -> None:
    known = {name for row in documented().items() for name in exposed(*row)}
    ours = {name for name in used() if name.startswith("sglang_hma:")}
    assert ours and not ours - known


def test_what_is_documented_is_on_the_dashboard() -> None:
    """But for sums that others are made of."""
    left_out = {"sglang_hma:kv_send_seconds_total", "sglang_hma:kv_sent_groups_total"}
    left_out |= {"sglang_hma:kv_verified_groups_total"}
    shown = " ".join(queries())
    assert {name for name in documented() if name not in shown} == left_out


def test_panels_have_their_own_place() -> None:
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken = [
        (x, y)
        for place in (panel["gridPos"] for panel in panels)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(set(taken)) == len(taken) and max(x for x, _ in taken) == 23
    for panel in panels:
        assert panel["type"] == "row" or (panel["title"] and panel["fieldConfig"])


def test_every_alert_says_what_to_look_at() -> None:
    groups = yaml.safe_load((MONITORING / "alerts.yml").read_text())["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    text = (ROOT / "docs" / "observability.md").read_text()
    for rule in rules:
        assert rule["annotations"]["summary"] and rule["annotations"]["description"]
        assert f"`{rule['alert']}`" in text
    tested = (MONITORING / "alerts_test.yml").read_text()
    assert all(f'alertname="{rule["alert"]}"' in tested for rule in rules)


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not on PATH")
@pytest.mark.parametrize(
    "arguments", [("check", "config", "prometheus.yml"), ("test", "rules", "alerts_test.yml")]
)
def test_prometheus_agrees(arguments: tuple[str, ...]) -> None:
    """And the alerts fire when they should, and only then."""
    done = subprocess.run(
        ["promtool", *arguments], cwd=MONITORING, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
