"""A request on its way through a fleet."""

import math
from dataclasses import dataclass, field

from sglang_hma.planner.trace import Request


@dataclass(eq=False, slots=True)
class Job:
    """Times in seconds on the simulation's clock, nan until they are known.

    promised_at, prefill_at, sending_at, landed_at: of a pair of prefill and decode only.
    """

    request: Request
    arrived_at: float
    known: int = 0
    """Tokens of the prompt that prefill had in its cache."""
    computed: int = 0
    """Tokens of the prompt that prefill has computed."""
    generated: int = 0
    promised_at: float = field(default=math.nan)
    """Decode has promised its pages."""
    prefill_at: float = field(default=math.nan)
    """Its first pass began."""
    sending_at: float = field(default=math.nan)
    """Its first pages left."""
    landed_at: float = field(default=math.nan)
    """Its last pages are at decode."""
    prefilled_at: float = field(default=math.nan)
    first_token_at: float = field(default=math.nan)
    finished_at: float = field(default=math.nan)
    retractions: int = 0

    @property
    def ttft_s(self) -> float:
        return self.first_token_at - self.arrived_at

    @property
    def tpot_s(self) -> float:
        """Between tokens, on average; 0 for one token."""
        made = self.request.output_tokens
        return (self.finished_at - self.first_token_at) / (made - 1) if made > 1 else 0.0
