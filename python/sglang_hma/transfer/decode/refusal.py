"""Decode's side of a refused handshake: read the prefill server's route, abort its requests.

A prefill server would wait minutes for a decode server that has refused it, and the router waits
for both. So decode sends SGLang's own ABORT for each room. It does so several times, because a
prefill server ignores rooms that have not arrived there yet.
"""

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import requests
from sglang.srt.disaggregation.common.conn import AbortNotification
from sglang.srt.utils.network import NetworkAddress

logger = logging.getLogger(__name__)

ROUTE_TIMEOUT_S = 5
ABORT_PAUSES_S = (0.0, 0.3, 1.0, 3.0, 6.0)
MAX_RANKS = 1024


def fetch_route(bootstrap_addr: str, *, dp: int = -1, tp: int = -1) -> dict[str, Any] | None:
    """What a bootstrap server says of its prefill server (ranks -1) or of one of its ranks.

    None if it cannot be reached or does not answer with a JSON object.
    """
    query = f"prefill_dp_rank={dp}&prefill_cp_rank={min(dp, 0)}&target_tp_rank={tp}"
    url = f"http://{bootstrap_addr}/route?{query}&target_pp_rank={min(dp, 0)}"
    try:
        reply = requests.get(url, timeout=ROUTE_TIMEOUT_S)
        reply.raise_for_status()
        route = reply.json()
    except (requests.RequestException, ValueError) as error:
        logger.debug("No route from %s yet: %s", bootstrap_addr, error)
        return None
    return route if isinstance(route, dict) else None


def rank_endpoints(bootstrap_addr: str, route: dict[str, Any]) -> list[NetworkAddress]:
    """The control ports of a prefill server's ranks."""
    sizes = [route.get(name) for name in ("dp_size", "attn_tp_size")]
    dp_size, tp_size = (n if isinstance(n, int) and 0 < n <= MAX_RANKS else 1 for n in sizes)
    endpoints = []
    for dp in range(dp_size):
        for tp in range(tp_size):
            rank = fetch_route(bootstrap_addr, dp=dp, tp=tp) or {}
            if "rank_ip" in rank and "rank_port" in rank:
                endpoints.append(NetworkAddress(str(rank["rank_ip"]), int(rank["rank_port"])))
    return endpoints


def abort_at_prefill(
    send: Callable[..., None], bootstrap_addr: str, route: dict[str, Any], rooms: Sequence[int]
) -> None:
    """Abort these rooms at every rank of a prefill server. Blocks for seconds."""
    try:
        endpoints = rank_endpoints(bootstrap_addr, route)
        for pause in ABORT_PAUSES_S:
            time.sleep(pause)
            for endpoint in endpoints:
                for room in rooms:
                    frames = AbortNotification(room=room).to_zmq()
                    send(endpoint.to_tcp(), frames, is_ipv6=endpoint.is_ipv6)
    except Exception:
        logger.exception("Could not tell prefill server %s of the refusal", bootstrap_addr)
