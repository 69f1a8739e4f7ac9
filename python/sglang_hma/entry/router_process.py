"""python -m sglang_hma.entry.router_process: sglang_router.launch_router, in a tenth of the time.

Beside the router it would import a debugging balancer, and SGLang for that one. With PARENT_ENV
set it is killed when that process dies, whatever that one dies of.
"""

import ctypes
import os
import signal
import sys
from types import ModuleType

PARENT_ENV = "SGLANG_HMA_ENTRY_PID"
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def end_with(parent: int) -> None:
    """Die with `parent`, which has started this process from its main thread."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:  # it died before it was asked for
        raise SystemExit(1)


def main() -> None:
    if parent := os.environ.get(PARENT_ENV):
        end_with(int(parent))
    balancer = ModuleType("sglang_router.mini_lb")
    balancer.MiniLoadBalancer = None  # type: ignore[attr-defined]
    sys.modules[balancer.__name__] = balancer

    from sglang_router.launch_router import main as launch

    launch()


if __name__ == "__main__":
    main()
