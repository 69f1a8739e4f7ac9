"""What a prefill server's transfer shows on /metrics beside its counters."""

from sglang_hma.gauges import GAUGES
from sglang_hma.transfer.claims import Claims
from sglang_hma.transfer.metrics import STUCK_PEERS
from sglang_hma.transfer.prefill.send_thread import SendThread
from sglang_hma.transfer.prefill.sender import PrefillSender


def show(sender: PrefillSender) -> None:
    GAUGES.gauge(
        "kv_oldest_write_seconds",
        "Age of the oldest group of layers on the wire, 0 without one",
        sender.thread,
        SendThread.oldest_write_s,
    )
    GAUGES.gauge(
        "kv_stuck_peers",
        STUCK_PEERS,
        sender.thread,
        SendThread.stuck_peers,
    )
    GAUGES.gauge(
        "kv_unclaimed_rooms",
        "Requests that are here and that no decode server has claimed",
        sender.claims,
        Claims.count_unclaimed,
    )
    GAUGES.gauge(
        "kv_unopened_rooms",
        "Requests that decode servers have claimed and that have not arrived here",
        sender.claims,
        Claims.count_unopened,
    )
    GAUGES.gauge(
        "kv_unsettled_rooms",
        "Requests whose failed writes may still be on their way; decode keeps their pages",
        sender,
        PrefillSender.count_unsettled,
    )
