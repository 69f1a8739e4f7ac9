"""docs/client-contract.md is what was seen, and every field that SGLang has is in it."""

import subprocess
import sys
from pathlib import Path

from benchmark.contract.fields import APIS, declared

ROOT = Path(__file__).parent.parent


def test_the_document_is_fresh() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "contract_doc.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_every_field_is_sent() -> None:
    for api in APIS:
        assert set(api.cases) == declared()[api.name], api.name
