"""docs/models.md is what its script makes of what was measured."""

import json
import subprocess
import sys
from pathlib import Path

from benchmark.models.families import FAMILIES

ROOT = Path(__file__).parent.parent.parent


def test_the_page_is_that_of_the_figures() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "models_doc.py"), "--check"]
    checked = subprocess.run(command, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr


def test_every_family_was_served_or_says_why_not() -> None:
    found = json.loads((ROOT / "docs" / "benchmarks" / "models.json").read_text())["families"]
    assert [one["family"] for one in found] == [family.name for family in FAMILIES]
    for one in found:
        assert one["verdict"] == "works" or one["reason"], one
        assert "nats" in one or one["verdict"] in ("refused", "not by SGLang"), one
    assert sum(one["verdict"] == "works" for one in found) >= 12
    assert not any(one["verdict"] == "wrong" for one in found)
