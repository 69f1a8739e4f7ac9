"""What the sender and the receiver need of the KV manager of their server.

HmaPrefillManager and HmaDecodeManager implement them with SGLang's tables, which remain the only
place where the status of a request is kept.
"""

from collections.abc import Sequence
from typing import Protocol

from sglang_hma.transfer.liveness import Address
from sglang_hma.transfer.messages import Message


class PrefillManager(Protocol):
    def is_failed(self, room: int) -> bool:
        """Whether a room has failed, was aborted, or is unknown."""

    def is_concluded(self, room: int) -> bool:
        """Whether a room has failed or succeeded, or is unknown."""

    def fail(self, room: int, reason: str) -> None:
        """The room has failed; decode is told the reason."""

    def succeed(self, room: int) -> None:
        """The room's pages have arrived, and are verified where decode verifies them."""

    def report_sent(self, room: int) -> None:
        """Tell every decode rank of the room that all writes of this rank are acknowledged."""

    def report_unopened(self, room: int, ranks: Sequence[Address], reason: str) -> None:
        """Tell decode ranks that a room which they wait for has failed before it got here."""

    def add_sends(self, room: int, change: int) -> None:
        """Count jobs of a room that are queued or being written. Called under the sender's lock."""

    def sends(self, room: int) -> int:
        """That count."""

    def confirm_drained(self, room: int) -> None:
        """If decode has aborted the room and nothing can be written to its pages any more: say so,
        and decode may reuse them."""

    def suspect(self, session: str) -> None:
        """A write to this peer has failed: refuse requests for it until it answers a probe."""

    def close_room(self, room: int) -> None:
        """Forget where a concluded room's pages go. Called under the sender's lock."""

    def forget_strays(self) -> None:
        """Forget what decode has said of rooms which never began here; called now and then."""

    def tell(self, address: Address, message: Message) -> None:
        """Send a message to a peer's control port; a peer that is gone is noticed elsewhere."""


class DecodeManager(Protocol):
    def reject(self, room: int, reason: str) -> None:
        """The room has failed here."""

    def accept(self, room: int, prefill_rank: int) -> None:
        """A prefill rank's report that it has sent everything holds: count it as success."""

    def tell(self, address: Address, message: Message) -> None:
        """Send a message to a peer's control port; a peer that is gone is noticed elsewhere."""
