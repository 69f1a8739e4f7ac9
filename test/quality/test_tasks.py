"""The two deployments' answers, question by question."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from benchmark.quality.tasks import TASKS, Answers, differences

LOCAL: Any = importlib.util.module_from_spec(
    spec := importlib.util.spec_from_file_location("local", TASKS / "local.py")
)
spec.loader.exec_module(LOCAL)


def test_questions_are_compared_one_by_one() -> None:
    key = ("task", "acc")
    ours: Answers = {key: {0: True, 1: True, 2: False, 5: True}}
    other: Answers = {key: {5: False, 2: False, 1: True, 0: False}}
    found = differences(ours, other)[key]
    assert (found.both, found.only_first, found.only_second, found.questions) == (1, 2, 0, 4)
    with pytest.raises(ValueError, match="different questions"):
        differences(ours, {key: {0: True}})
    with pytest.raises(ValueError, match="different metrics"):
        differences(ours, {("task", "f1"): other[key]})


DOC = {
    "prompt": "def twice(x):\n",
    "test": "def check(f):\n    assert f(4) == 8\n",
    "entry_point": "twice",
}


@pytest.mark.parametrize(
    ("completion", "passed"),
    [
        ("    return 2 * x\n", 1.0),
        ("    return x\n", 0.0),
        ("    return (\n", 0.0),
        ("    with open('left', 'w') as f: f.write('x')\n    return 2 * x\n", 0.0),
        ("    return len(bytearray(8 << 30)) and 2 * x\n", 0.0),
    ],
)
def test_a_completion_passes_if_its_tests_do(
    completion: str, passed: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert LOCAL.run_tests(DOC, [completion]) == {"pass@1": passed}
    assert not list(tmp_path.iterdir())


def test_a_completion_that_never_ends_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LOCAL, "SECONDS", 1)
    assert LOCAL.run_tests(DOC, ["    while True: pass\n"]) == {"pass@1": 0.0}
