"""What a mix is named and finds in a Kubernetes cluster."""

import re
from dataclasses import dataclass
from typing import Any, get_args

from sglang_hma.planner.deployment import Role

Manifest = dict[str, Any]

COMPONENT = "app.kubernetes.io/component"


@dataclass(frozen=True)
class Cluster:
    """What the pods find there.

    model_volume: of the folder above the model; None for a hub name. board: of the GDDR cards, as
    the vendor's DRA driver names it. gddr_resource: of a device plugin, instead of that driver's
    claims.
    """

    image: str
    name: str = "hma"
    namespace: str | None = None
    model_volume: Manifest | None = None
    board: str = "p150"
    gddr_resource: str | None = None
    hbm_resource: str = "nvidia.com/gpu"
    rdma_resource: str | None = None
    host_network: bool = False
    shared_memory: str = "16Gi"
    startup_minutes: int = 30
    grace_seconds: int = 300

    def part(self, role: str) -> str:
        return f"{self.name}-{role}"

    def host(self, role: Role, index: int) -> str:
        """Of a StatefulSet's pod, from within its namespace."""
        return f"{self.part(role)}-{index}.{self.part(role)}"

    def labels(self, role: str) -> dict[str, str]:
        return {**self._common, COMPONENT: role}

    @property
    def servers(self) -> Manifest:
        """Selects the pods of all servers, not the router's."""
        roles = {"key": COMPONENT, "operator": "In", "values": list(get_args(Role))}
        return {"matchLabels": self._common, "matchExpressions": [roles]}

    @property
    def _common(self) -> dict[str, str]:
        return {"app.kubernetes.io/name": "sglang-hma", "app.kubernetes.io/instance": self.name}

    def metadata(self, role: str, name: str | None = None) -> Manifest:
        found: Manifest = {"name": name or self.part(role), "labels": self.labels(role)}
        return found | ({"namespace": self.namespace} if self.namespace else {})


def board_of(card: str) -> str:
    """How the vendor's driver names a catalogue card: p100a is a p100."""
    return re.sub(r"(?<=\d)[a-z]+$", "", card)
