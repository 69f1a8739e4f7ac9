"""SGLang's /start_profile, of a server that serves on whatever comes of it."""

import logging
from typing import Any

logger = logging.getLogger(__name__)


def profile(original: Any, manager: Any, recv_req: Any) -> Any:
    """Around SchedulerProfilerManager._profile. What cannot be profiled (a tool that is not
    installed, a folder that cannot be written) is answered as not done."""
    from sglang.srt.managers.io_struct import ProfileReqOutput

    try:
        return original(manager, recv_req)
    except Exception as error:
        logger.exception("No profile")
        return ProfileReqOutput(success=False, message=f"no profile: {error!r}"[:300])
