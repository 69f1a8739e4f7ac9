"""Servers with different protocol versions refuse each other, in words that both clients see."""

import numpy as np
import pytest
from sglang.srt.disaggregation.base.conn import KVPoll

from sglang_hma.transfer import messages
from sglang_hma.transfer.messages import PROTOCOL

from .real_managers import Pair, until


def test_an_older_decode_server_is_refused(managers: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    frame = managers.decode.handshake.frame()
    monkeypatch.setattr(
        managers.decode.handshake,
        "frame",
        lambda: frame.replace(b"/%d " % messages.PROTOCOL, b"/0 "),
    )
    room = next(managers.rooms)
    sender, receiver = managers.sender(room), managers.receiver(room)
    receiver.send_metadata(np.array([1, 2], dtype=np.int32), aux_index=0)
    until(lambda: sender.poll() == KVPoll.WaitingForInput)
    sender.init(2, 0)
    sender.send(np.array([1, 2], dtype=np.int32))
    until(lambda: sender.poll() == receiver.poll() == KVPoll.Failed)
    for end in (sender, receiver):
        with pytest.raises(Exception, match=rf"version 0 .*version {PROTOCOL}: run the same"):
            end.failure_exception()


def test_messages_say_their_version() -> None:
    for frames in map(messages.frames, (messages.Claim(1, "::1", 2), messages.Verified(1, 2, "h"))):
        assert frames[1] == b"%d" % PROTOCOL
