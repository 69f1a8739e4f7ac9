"""What the send thread keeps of one decode server."""

from collections import deque
from dataclasses import dataclass, field

from sglang_hma.transfer.prefill.jobs import Group, Job
from sglang_hma.transfer.prefill.link_model import LinkModel


@dataclass
class Peer:
    """`window` are the groups on the wire, `stuck` those that were given up and have not ended.
    `writes` counts what Mooncake has of both; `progress_s` is when one of them ended last."""

    session: str
    jobs: deque[Job] = field(default_factory=deque)
    window: deque[Group] = field(default_factory=deque)
    stuck: list[Group] = field(default_factory=list)
    link_model: LinkModel = field(default_factory=LinkModel)
    writes: int = 0
    progress_s: float = 0.0
    last_end_s: float = 0.0

    def on_wire(self) -> list[Group]:
        """From any thread."""
        return [*self.stuck, *self.window]

    @property
    def idle(self) -> bool:
        return not (self.jobs or self.window or self.stuck)
