"""How a run over a fleet ends."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any


def concluded(found: Any, file: Path | None) -> int:
    """The exit code; all of `found`, a dataclass that says what is `wrong`, in `file`."""
    if file is not None:
        file.write_text(json.dumps(asdict(found), indent=1) + "\n")
    return 1 if found.wrong else 0
