"""Why a program ended, out of the end of its log: a few lines that say it, and a remedy."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

SHOWN_LINES = 8

# One-line errors: ours, argparse's.
ONE_LINE = re.compile(r"^[\w./ -]+: error: ")
STAMP_OF_SGLANG = re.compile(r"^\[\d{4}-\d\d-\d\d [^\]]*\] ")
# What SGLang logs when one of its processes is gone, for whatever reason.
CHILD_DIED = re.compile(r"^Subprocess (\S+) \(pid=\d+\) crashed with exit code -?\d+")
TRACEBACK = "Traceback (most recent call last):"
STAMP = re.compile(r"^\[?\d{4}-\d\d-\d\d[ T]")
NOISE = re.compile(
    "|".join(
        (
            r"^\s*$",
            r"Warning: |^\s+warnings\.warn\(",
            r"\d%\s*(Completed)? *\||it/s\]",  # progress bars
            r"^[IW]\d{4} \d\d:|InitGoogleLogging",  # glog
            r"^\W+$",  # rulers
            r"\bINFO\b|\bWARN(ING)?\b",
            r"kill_process_tree called|Received sigquit from a child|server_args=",
        )
    )
)

REMEDIES = (
    (
        r"No space left on device|disk quota exceeded",
        "free some disk space",
    ),
    (
        r"unrecognized arguments|invalid choice|expected one argument",
        "see python -m sglang_hma.launch_server --help",
    ),
    (
        r"MemoryError|bad_alloc|[Cc]annot allocate memory|out of memory|exit code: -9",
        "free some memory, or give the KV cache less of it with --max-total-tokens",
    ),
    (
        r"[Aa]ddress already in use",
        "another program took the port meanwhile; start again",
    ),
    (
        r"[Cc]annot find any model weights",
        "give a --model-path that holds the model's *.safetensors",
    ),
)
KILLED = "perhaps for lack of memory: free some, or lower --max-total-tokens"


@dataclass(frozen=True)
class Diagnosis:
    """`words`: lines of the log, an error if `explained`. `remedy`: "" if nobody knows one."""

    words: list[str]
    remedy: str
    explained: bool


def diagnose(lines: Sequence[str], killed: bool) -> Diagnosis:
    """What the `lines` that a program ended with tell; `killed`: by SIGKILL."""
    words = one_line_error(lines) or exception(lines) or child_died(lines)
    if not words:
        words = [line for line in lines if not NOISE.search(line)][-SHOWN_LINES:]
        return Diagnosis(words, KILLED if killed else remedy(words), explained=False)
    return Diagnosis(words, remedy(words), explained=True)


def one_line_error(lines: Sequence[str]) -> list[str]:
    plain = (STAMP_OF_SGLANG.sub("", line) for line in lines)
    return [line for line in plain if ONE_LINE.match(line)][-1:]


def child_died(lines: Sequence[str]) -> list[str]:
    plain = (STAMP_OF_SGLANG.sub("", line) for line in lines)
    return [found[0] for line in plain if (found := CHILD_DIED.match(line))][-1:]


def exception(lines: Sequence[str]) -> list[str]:
    """The exception of the last traceback, with what its message has in further lines."""
    starts = [i for i, line in enumerate(lines) if line.endswith(TRACEBACK)]
    if not starts:
        return []
    end = starts[-1] + 1
    while end < len(lines) and lines[end][:1] in (" ", "\t"):
        end += 1
    message = []
    for line in lines[end : end + SHOWN_LINES]:
        if not line.strip() or STAMP.match(line):
            break
        message.append(line)
    return message


def remedy(words: Sequence[str]) -> str:
    text = "\n".join(words)
    return next((advice for pattern, advice in REMEDIES if re.search(pattern, text)), "")
