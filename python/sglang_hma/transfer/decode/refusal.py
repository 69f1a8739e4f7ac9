"""Decode's side of a refused handshake, or of a restarted prefill server: abort the requests there.

A prefill server would wait minutes for a decode server that has refused it, and the router waits
for both. So decode sends SGLang's own ABORT for each room. It does so several times, because a
prefill server ignores rooms that have not arrived there yet.
"""

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

from sglang.srt.disaggregation.common.conn import AbortNotification
from sglang.srt.utils.network import NetworkAddress

from sglang_hma.transfer.decode import routes

logger = logging.getLogger(__name__)

ABORT_PAUSES_S = (0.0, 0.3, 1.0, 3.0, 6.0)


def rank_endpoints(bootstrap_addr: str, route: dict[str, Any]) -> list[NetworkAddress]:
    """The control ports of a prefill server's ranks, as far as it tells them."""
    sizes = [route.get(name) for name in ("dp_size", "attn_tp_size")]
    dp_size, tp_size = (n if type(n) is int and 0 < n <= routes.MAX_RANKS else 1 for n in sizes)
    endpoints: list[NetworkAddress] = []
    for dp in range(dp_size):
        for tp in range(tp_size):
            answer = routes.fetch(bootstrap_addr, (dp, 0, tp, 0))
            if answer is None or answer.denied is not None:
                return endpoints
            try:
                rank = routes.parse_rank(answer.route)
            except ValueError:
                return endpoints
            endpoints.append(NetworkAddress(rank.rank_ip, rank.rank_port))
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
