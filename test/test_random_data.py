"""Tests on random data see new values in every run and are not judged by their time."""

import subprocess
import sys
from pathlib import Path

OTHER_SETTINGS = """
import hypothesis

hypothesis.settings.register_profile("other", deadline=200, max_examples=10, derandomize=True)
hypothesis.settings.load_profile("other")
"""
TESTS = """
import time
from hypothesis import given, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

@given(st.booleans())
def test_slow(value):
    time.sleep(0.25)

@settings(max_examples=2)
@given(st.lists(st.integers(0, 9).map(lambda n: time.sleep(0.3) or n), min_size=4, max_size=4))
def test_slow_to_draw(values):
    pass

class Machine(RuleBasedStateMachine):
    @rule()
    def step(self):
        time.sleep(0.25)

TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=1, stateful_step_count=1)

settings_here = settings()

def test_fresh():
    assert settings_here.database is None and not settings_here.derandomize
    assert settings_here.max_examples > 10
"""


def test_no_import_changes_what_hypothesis_does(tmp_path: Path) -> None:
    (tmp_path / "test_a.py").write_text(OTHER_SETTINGS)
    (tmp_path / "test_b.py").write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-c", "/dev/null", "--rootdir", str(tmp_path)]
    command += ["-p", "test.conftest", "-p", "no:cacheprovider", "-q", str(tmp_path)]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "4 passed" in done.stdout
