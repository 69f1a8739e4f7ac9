"""What a server keeps of requests."""

from typing import Any

from sglang_hma.transfer.message_intake import MessageIntake

from .protocol_decode import Decode
from .protocol_prefill import Prefill
from .protocol_servers import Server
from .real_managers import PAGES, ROWS, WINDOW_PAGES


def left_over(server: Server) -> dict[str, Any]:
    """What is kept of requests although all have ended."""
    manager: Any = server.manager
    intake: MessageIntake = manager.intake
    found: dict[str, Any] = {
        "rooms": manager.rooms._published,
        "status": manager.request_status,
        "reasons": manager.failure_records,
    }
    if isinstance(server, Prefill):
        assert server.sender is not None
        claims, thread, lists = server.sender.claims, server.sender.thread, intake.page_lists  # type: ignore[attr-defined]
        found |= {
            "halves": server.halves,
            "sends": {room: n for room, n in manager._staging_outstanding.items()},
            "page lists at SGLang": manager.transfer_infos,
            "prefixes": manager.req_to_decode_prefix_len,
            "abort targets": manager._deferred_ack_targets,
            "poisoned": manager._deferred_ack_poisoned_rooms,
            "page lists": lists._lists,
            "waiting page lists": lists._waiting_bytes,
            "bytes of page lists": lists._total_bytes,
            "requests": server.sender.requests,
            "drains": server.sender._draining,
            "claims": claims._claimants,
            "opened": claims._opened_s,
            "early claims": len(claims._early),
            "peers": [peer for peer in thread.peers.values() if not peer.idle or peer.writes],
            "jobs": thread._incoming,
            "holds": server.held,
            "strays": manager._strays._since_s,
            "hashes": server.hashing.waiting,
        }
    else:
        assert isinstance(server, Decode)
        found |= {
            "waiting": server.waiting,
            "running": server.running,
            "transferring": server.queue.queue,
            "kept": server.queue._deferred_releases,
            "asked": server.queue._asked_s,
            "owners": server.owners,
            "expected": manager.required_prefill_response_num_table,
            "responses": manager.prefill_response_tracker,
            "by address": [rooms for rooms in manager.addr_to_rooms_tracker.values() if rooms],
            "aborts": manager._deferred_abort_ack_tracker,
            "quarantine": manager.quarantine._kept,
            "gone": manager._gone,
            "refused": manager.refused,
            "receiver": manager.receiver.requests,
            "arrivals": manager.receiver.verifier.arrivals,
            "claimed": [rooms for rooms in manager._claim_renewer._rooms.values() if rooms],
        }
    sides = {
        "free pages": PAGES - len(server.free_pages),
        "free rows": ROWS - len(server.free_rows),
        "free windows": WINDOW_PAGES - 1 - len(server.free_windows),
    }
    return {name: kept for name, kept in (found | sides).items() if kept}
