"""python -m sglang_hma.entry.router_process: sglang_router.launch_router, in a tenth of the time.

Beside the router it would import a debugging balancer, and SGLang for that one.
"""

import sys
from types import ModuleType

balancer = ModuleType("sglang_router.mini_lb")
balancer.MiniLoadBalancer = None  # type: ignore[attr-defined]
sys.modules[balancer.__name__] = balancer

from sglang_router.launch_router import main  # noqa: E402

if __name__ == "__main__":
    main()
