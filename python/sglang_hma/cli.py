"""sglang-hma: one command for what `python -m sglang_hma.*` does."""

import runpy
import sys

from sglang_hma import __version__

# command: (module that runs with the rest of the arguments, what it does)
COMMANDS = {
    "check-env": ("sglang_hma.check_env", "say what this box can serve, and what it lacks"),
    "demo-model": ("sglang_hma.demo_model", "get a small model to try the servers with"),
    "serve": ("sglang_hma.launch_pd", "prefill servers, decode servers and a router on one box"),
    "launch-server": ("sglang_hma.launch_server", "one server of a role: prefill, decode or both"),
    "top": ("sglang_hma.top", "what servers do at the moment, in a table"),
    "compare": (
        "sglang_hma.prefill.compare",
        "compare a prefill runtime with transformers, layer by layer",
    ),
    "planner": ("sglang_hma.planner", "which fleet gives the most goodput for the money (begun)"),
}

USAGE = """\
usage: sglang-hma COMMAND [ARGUMENTS]
       sglang-hma COMMAND --help      what COMMAND takes
       sglang-hma --version

SGLang with prefill and decode on different kinds of machine and the KV cache in BFP8.

{commands}

Each is also `python -m MODULE`. On a box without GPU, start with

  sglang-hma check-env
  sglang-hma demo-model demo
  sglang-hma serve --model-path demo

The last prints a URL and a curl when it is ready; Ctrl-C stops it.
"""


def usage() -> str:
    lines = [f"  {name:14} {does} ({module})" for name, (module, does) in COMMANDS.items()]
    return USAGE.format(commands="\n".join(lines))


def main(argv: list[str] | None = None) -> int:
    """Run a command; its exit code, or 2 with a line on stderr if there is no such command."""
    command, *arguments = (sys.argv[1:] if argv is None else argv) or [""]
    if command in ("-h", "--help", "help"):
        print(usage(), end="")
        return 0
    if command in ("-V", "--version"):
        print(f"sglang-hma {__version__}")
        return 0
    if command not in COMMANDS:
        given = f"the command is {command}" if command else "no command is given"
        names = ", ".join(COMMANDS)
        print(f"sglang-hma: error: {given}: give one of {names}; see --help", file=sys.stderr)
        return 2
    # As `python -m` does: a process that it spawns imports the module first, not this one.
    sys.argv = [f"sglang-hma {command}", *arguments]
    runpy.run_module(COMMANDS[command][0], run_name="__main__", alter_sys=True)
    return 0
