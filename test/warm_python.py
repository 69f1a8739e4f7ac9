"""Python processes that start in a fifth of the time: what SGLang imports of others is there.

    with WarmPython() as python:
        done = python("-c", "import sglang; ...", env={...})

Each is forked from one process that has imported torch, transformers and the like, 13 of the 16
seconds that SGLang's imports take, and nothing of sglang, sglang_hma or hma_kernels.
"""

import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

MODULES = (
    *("torch._inductor.compile_fx", "torch.distributed.tensor"),
    *("transformers.generation", "transformers.models.auto", "transformers.modeling_utils"),
    *("aiohttp", "fastapi", "openai", "uvicorn", "zmq.asyncio"),
)


class WarmPython:
    def __enter__(self) -> "WarmPython":
        command = [sys.executable, "-P", __file__]
        self._popen = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._popen.stdin.close()
        self._popen.wait()

    def __call__(
        self, *arguments: str, env: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """As subprocess.run([sys.executable, *arguments]) with -m MODULE or -c CODE."""
        with tempfile.TemporaryDirectory() as folder:
            out, err = (Path(folder, name) for name in ("out", "err"))
            wanted = {"arguments": arguments, "out": str(out), "err": str(err), "cwd": os.getcwd()}
            self._tell(wanted | {"env": dict(os.environ if env is None else env)})
            pid = self._hear()
            try:
                code = self._hear()
            except BaseException:  # pytest's timeout
                os.killpg(pid, signal.SIGKILL)
                self._hear()
                raise
            return subprocess.CompletedProcess(arguments, code, out.read_text(), err.read_text())

    def _tell(self, wanted: dict[str, Any]) -> None:
        self._popen.stdin.write(json.dumps(wanted) + "\n")
        self._popen.stdin.flush()

    def _hear(self) -> int:
        return int(self._popen.stdout.readline())


def next_child() -> dict[str, Any] | None:
    """In each forked child, what it shall do; None in the parent, at the end."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            return dict(json.loads(line))
        answers.write(f"{pid}\n")
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        answers.write(f"{code}\n")
    return None


def become(wanted: dict[str, Any]) -> None:
    os.setsid()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for name, number in (("out", 1), ("err", 2)):
        os.dup2(os.open(wanted[name], os.O_WRONLY | os.O_CREAT), number)
    os.chdir(wanted["cwd"])
    os.environ.clear()
    os.environ.update(wanted["env"])
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[0:0] = ["", *filter(None, paths)]


def main() -> None:
    for module in MODULES:
        __import__(module)
    if (wanted := next_child()) is None:
        return
    become(wanted)
    kind, code, *rest = wanted["arguments"]
    sys.argv = [code if kind == "-m" else "-c", *rest]
    if kind == "-m":
        runpy.run_module(code, run_name="__main__", alter_sys=True)
    else:
        sys.modules["__main__"] = types.ModuleType("__main__")
        exec(code, sys.modules["__main__"].__dict__)


if __name__ == "__main__":
    main()
