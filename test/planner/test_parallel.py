"""Workers end with the process that asks them, however it ends."""

import os
import subprocess
import sys
import uuid

import pytest

from ..launch.fleet import MARK, carrying, until

ASKS = """
import time
from sglang_hma.planner import parallel

if __name__ == "__main__":
    parallel.each(time.sleep, [3600] * 3, processes=2)
"""


@pytest.mark.parametrize("how", ["terminate", "kill"])
def test_no_worker_is_left(how: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    script = tmp_path_factory.mktemp("asks") / "asks.py"
    script.write_text(ASKS)
    mark = uuid.uuid4().hex
    with subprocess.Popen([sys.executable, script], env=os.environ | {MARK: mark}) as asker:
        # The asker, the resource tracker, the fork server and two workers.
        until(lambda: len(carrying(mark)) == 5)
        getattr(asker, how)()
    until(lambda: carrying(mark) == {})
