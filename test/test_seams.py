"""Every hook takes hold in a fresh process, is noticed when it does not, and is documented."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sglang_hma.config import HmaConfig, WeightFormats
from sglang_hma.seams import SEAMS

from .warm_python import WarmPython

DOCS = Path(__file__).parent.parent / "docs" / "sglang-seams.md"

CHECK = """
import pkgutil
from sglang.srt.plugins import load_plugins
from sglang_hma import seams
from sglang_hma.config import HmaConfig

config = HmaConfig.require()
active = [seam.target for seam in seams.SEAMS if seam.applies(config)]
originals = {}
for target in active:
    owner, name = target.rsplit(".", 1)
    originals[target] = (pkgutil.resolve_name(owner), name, pkgutil.resolve_name(target))
load_plugins()
seams.verify(config)
for target, (owner, name, original) in originals.items():
    ours = getattr(owner, name)
    setattr(owner, name, original)
    try:
        seams.verify(config)
    except RuntimeError as error:
        assert target in str(error), error
    else:
        raise AssertionError(f"{target} was lost and nobody noticed")
    setattr(owner, name, ours)
seams.verify(config)
print("checked", len(active))
"""


@pytest.mark.parametrize(
    ("config", "active"),
    [
        (HmaConfig(role="decode"), 7),
        (
            HmaConfig(
                role="prefill", kv_format="native", weight_formats=WeightFormats.all("native")
            ),
            5,
        ),
    ],
)
def test_hooks_take_hold_and_their_loss_is_noticed(
    python: WarmPython, config: HmaConfig, active: int
) -> None:
    done = python("-c", CHECK, env=os.environ | config.environment())
    assert f"checked {active}" in done.stdout, done.stderr[-3000:]


def test_every_hook_is_documented() -> None:
    text = DOCS.read_text()
    assert [seam.target for seam in SEAMS if seam.target not in text] == []


def test_plain_sglang_is_left_alone() -> None:
    """Without our launcher both entry points do nothing."""
    code = "import sglang_hma; print(sglang_hma.activate(), sglang_hma.register())"
    env = {k: v for k, v in os.environ.items() if k != "SGLANG_HMA_CONFIG"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.stdout.split() == ["None", "None"]
