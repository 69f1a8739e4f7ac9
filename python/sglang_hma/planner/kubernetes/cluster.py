"""What a fleet is named and finds in a Kubernetes cluster."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

from sglang_hma.planner.deployment import Role

Manifest = dict[str, Any]

COMPONENT = "app.kubernetes.io/component"
# A server ends within so many seconds once the requests that it had are finished or cut.
ENDING_S = 30


@dataclass(frozen=True)
class Cluster:
    """What the pods find there.

    image: of every pod that `images` (by prefill, decode or router) does not name another for.
    model_volume: of the folder above the model; None for a hub name. board: of the GDDR cards, as
    the vendor's DRA driver names it. gddr_resource: of a device plugin, instead of that driver's
    claims. discovery: the router finds servers by their labels, so their number may change; without
    it servers have names, and decode takes pages from those alone. secret: name of the Secret whose
    key `secret` all servers share. metrics_namespace: whose pods may read metrics.
    """

    image: str
    images: Mapping[str, str] = field(default_factory=dict)
    name: str = "hma"
    namespace: str | None = None
    model_volume: Manifest | None = None
    board: str = "p150"
    gddr_resource: str | None = None
    hbm_resource: str = "nvidia.com/gpu"
    rdma_resource: str | None = None
    host_network: bool = False
    discovery: bool = False
    secret: str = "sglang-hma-cluster"
    metrics_namespace: str = "monitoring"
    server_cpus: str = "8"
    server_memory: str = "64Gi"
    shared_memory: str = "16Gi"
    startup_minutes: int = 30
    grace_seconds: int = 300

    @property
    def drain_seconds(self) -> int:
        """For running requests, after SIGTERM."""
        return max(0, self.grace_seconds - ENDING_S)

    def image_of(self, part: str) -> str:
        return self.images.get(part, self.image)

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
