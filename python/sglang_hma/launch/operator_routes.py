"""SGLang's commands for an operator that need a flag, as ASGI middleware.

Without its flag such a command ends the scheduler, and with it all running requests.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

MEMORY, EXPERTS = "enable_memory_saver", "expert_distribution_recorder_mode"
NEEDS: Mapping[str, str] = {
    "/release_memory_occupation": MEMORY,
    "/resume_memory_occupation": MEMORY,
    "/start_expert_distribution_record": EXPERTS,
    "/stop_expert_distribution_record": EXPERTS,
    "/dump_expert_distribution_record": EXPERTS,
}


class OperatorRoutes:
    """Answers 400 for a route of NEEDS whose setting is not on. `setting` gives the value of one of
    SGLang's server arguments by its name."""

    def __init__(self, application: Any, *, setting: Callable[[str], Any]) -> None:
        self._application, self._setting = application, setting

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        needed = NEEDS.get(scope["path"].rstrip("/")) if scope["type"] == "http" else None
        if needed is None or self._setting(needed):
            await self._application(scope, receive, send)
            return
        flag = "--" + needed.replace("_", "-")
        message = f"{scope['path']} needs {flag}, with which this server was not started"
        body = json.dumps({"error": {"message": message}}).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": 400, "headers": headers})
        await send({"type": "http.response.body", "body": body})
