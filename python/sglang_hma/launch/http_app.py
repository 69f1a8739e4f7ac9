"""SGLang's HTTP application, guarded. SGLang's tokenizer workers import `app` from here."""

import multiprocessing
import os
import signal
from typing import Any

from sglang.srt.entrypoints import http_server
from sglang.srt.managers.tokenizer_manager import ServerStatus
from sglang.srt.utils import kill_process_tree

from sglang_hma.config import HmaConfig
from sglang_hma.launch.guarded import Engine, Guarded
from sglang_hma.launch.operator_routes import OperatorRoutes
from sglang_hma.launch.unpacking import Unpacking


def started() -> Engine | None:
    """SGLang's tokenizer manager once its server has warmed up."""
    state = http_server.get_global_state()
    if state is None or state.tokenizer_manager.server_status is ServerStatus.Starting:
        return None
    engine: Engine = state.tokenizer_manager
    return engine


def main_process() -> int:
    """Of the server: a tokenizer worker is a child of it."""
    parent = multiprocessing.parent_process()
    return os.getpid() if parent is None or parent.pid is None else parent.pid


def end() -> None:
    """SGLang's main process ends all of them on SIGQUIT, unless tokenizer workers serve for it."""
    root = main_process()
    if root == os.getpid():
        os.kill(root, signal.SIGQUIT)
    else:
        kill_process_tree(root, skip_pid=os.getpid(), wait_timeout=None)
        os.kill(os.getpid(), signal.SIGKILL)


def setting(name: str) -> Any:
    """Of SGLang's server arguments, once there are some."""
    state = http_server.get_global_state()
    return None if state is None else getattr(state.tokenizer_manager.server_args, name)


config = HmaConfig.require()
app = http_server.app
app.add_middleware(OperatorRoutes, setting=setting)
app.add_middleware(
    Guarded,
    started=started,
    root=main_process(),
    end=end,
    drain_timeout=config.drain_timeout,
    hang_timeout=config.hang_timeout,
)
app.add_middleware(Unpacking)
