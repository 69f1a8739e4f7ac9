"""Two requests with one room: the first is served, the second is refused in words."""

import pytest
from sglang.srt.disaggregation.base.conn import KVPoll
from sglang.srt.disaggregation.common.conn import KVTransferError

from sglang_hma.transfer.rooms import Rooms

from .real_managers import Pair, arrive, until


def test_rooms() -> None:
    rooms = Rooms()
    assert rooms.open(5) is None
    assert "5 belongs to another request" in str(rooms.open(5))
    assert rooms.is_open(5) and not rooms.is_published(5)
    rooms.publish(5)
    assert rooms.is_published(5)
    rooms.close(5)
    rooms.publish(5)
    assert not rooms.is_open(5) and not rooms.is_published(5) and rooms.open(5) is None
    for bad in (-1, 2**63, None, "5"):
        assert "is not a number in 0..2^63-1" in str(rooms.open(bad))


@pytest.mark.parametrize("again", ["prefill", "decode", "both"])
def test_the_second_is_refused_and_the_first_is_served(managers: Pair, again: str) -> None:
    room = next(managers.rooms)
    sender, receiver = managers.sender(room), managers.receiver(room)
    seconds = []
    if again != "decode":
        seconds.append(managers.sender(room))
    if again != "prefill":
        seconds.append(managers.receiver(room))
    for second in seconds:
        assert second.poll() == KVPoll.Failed
        with pytest.raises(KVTransferError, match="belongs to another request"):
            second.failure_exception()
        second.abort()
        second.clear()
    arrive(managers, sender, receiver, [1, 2], [3, 4])
    # The room is free again.
    managers.transfer(room, [5, 6], [7, 8])


@pytest.mark.parametrize("room", [-5, 2**63])
def test_rooms_that_are_no_rooms(managers: Pair, room: int) -> None:
    for made in (managers.sender(room), managers.receiver(room)):
        assert made.poll() == KVPoll.Failed
        with pytest.raises(KVTransferError, match=r"is not a number in 0\.\.2\^63-1"):
            made.failure_exception()
        made.clear()
    assert room not in managers.prefill.request_status
    assert room not in managers.decode.request_status
    managers.check()


def test_an_aborted_room_is_free_again(managers: Pair) -> None:
    room = next(managers.rooms)
    sender, receiver = managers.sender(room), managers.receiver(room)
    receiver.abort()
    # Decode's message has arrived: it would abort whoever has the room by then.
    until(lambda: sender.poll() == receiver.poll() == KVPoll.Failed)
    sender.clear()
    receiver.clear()
    managers.transfer(room, [5, 6], [7, 8])
