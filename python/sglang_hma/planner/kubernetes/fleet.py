"""What runs in the pods: of a mix that the planner found, or of any other."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from sglang_hma.planner.deployment import PORT, Plan, Role, named_servers, router, server
from sglang_hma.planner.kubernetes.cluster import Cluster
from sglang_hma.planner.systems import COLOCATED

# The one address at which a server's ports can be reached; Kubernetes puts the pod's in.
POD_IP, POD_NAMESPACE = "$(POD_IP)", "$(POD_NAMESPACE)"


@dataclass(frozen=True)
class Devices:
    """Of one server.

    limits: counts by resource name. cards: whether it computes on Tenstorrent cards, whose numbers
    it is told in its pod. claimed: how many of them a DRA claim gives it.
    """

    limits: Mapping[str, str] = field(default_factory=dict)
    cards: bool = False
    claimed: int = 0


@dataclass(frozen=True)
class Fleet:
    """commands: of one server of each role, and the router's. stock: SGLang's own launcher starts
    the servers, which are of one kind then, called decode."""

    commands: Mapping[Role, Sequence[str]]
    replicas: Mapping[Role, int]
    devices: Mapping[Role, Devices]
    router: Sequence[str]
    model: str
    stock: bool = False


def fleet_of(plan: Plan, cluster: Cluster) -> Fleet:
    """Of a mix."""
    devices = {role: _devices(plan, cluster, role) for role in plan.roles}
    found = finds_pods(plan, cluster) if cluster.discovery else named_servers(plan, cluster.host)
    peers = None if cluster.discovery else cluster.host
    return Fleet(
        commands={
            role: server(plan, role, host=POD_IP, peers=peers, card_ids=not devices[role].cards)
            for role in plan.roles
        },
        replicas=plan.roles,
        devices=devices,
        router=router(plan, *found, *router_waits(cluster)),
        model=plan.model,
        stock=plan.system in COLOCATED,
    )


def router_waits(cluster: Cluster) -> list[str]:
    return ["--worker-startup-timeout-secs", str(60 * cluster.startup_minutes)]


def finds_pods(plan: Plan, cluster: Cluster) -> list[str]:
    """The router's flags for servers that it finds by their labels, ready ones, by their address.

    A prefill server's bootstrap port is in an annotation of its pod (BOOTSTRAP_ANNOTATION).
    """
    flags = ["--service-discovery", "--service-discovery-namespace", POD_NAMESPACE]
    flags += ["--service-discovery-port", str(PORT)]
    for role in plan.roles:
        flag = f"--{role}-selector" if plan.prefill else "--selector"
        flags += [flag, *(f"{key}={value}" for key, value in cluster.labels(role).items())]
    return flags


def _devices(plan: Plan, cluster: Cluster, role: Role) -> Devices:
    site, limits = plan.site, {}
    cards = role == "prefill" and plan.on_gddr
    claimed = 0
    if not cards:
        limits[cluster.hbm_resource] = str(site.hbm_cards)
    elif cluster.gddr_resource:
        limits[cluster.gddr_resource] = str(site.gddr_cards)
    else:
        claimed = site.gddr_cards
    if cluster.rdma_resource:
        limits[cluster.rdma_resource] = "1"
    return Devices(limits, cards, claimed)
