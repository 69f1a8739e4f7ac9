"""Who may speak to whom: Services and NetworkPolicies."""

from typing import Any

from sglang_hma.planner.deployment import BOOTSTRAP, PORT, ROUTER_PORT, Role
from sglang_hma.planner.kubernetes.cluster import Cluster, Manifest

DNS = 53
# Between prefill and decode, beside the bootstrap port (docs/security.md).
MOONCAKE, CONTROL = (15000, 17000), (32768, 65535)
OTHER: dict[Role, Role] = {"prefill": "decode", "decode": "prefill"}


def headless(cluster: Cluster, role: Role) -> Manifest:
    """Names resolve before a server is ready: the router waits by itself, and transfers under way
    must not lose their peer."""
    ports = [{"name": "http", "port": PORT, "targetPort": "http"}]
    if role == "prefill":
        ports.append({"name": "bootstrap", "port": BOOTSTRAP, "targetPort": "bootstrap"})
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": cluster.metadata(role),
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": cluster.labels(role),
            "ports": ports,
        },
    }


def router_service(cluster: Cluster) -> Manifest:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": cluster.metadata("router"),
        "spec": {
            "selector": cluster.labels("router"),
            "ports": [{"name": "http", "port": ROUTER_PORT, "targetPort": "http"}],
        },
    }


def policy(cluster: Cluster, role: Role, *, pair: bool) -> Manifest:
    """The router, and who reads metrics, reach a server's HTTP port; the other role its transfer's.
    Whatever a request names, a server of a pair goes to nobody but the other role."""
    spec: dict[str, Any] = {
        "podSelector": {"matchLabels": cluster.labels(role)},
        "policyTypes": ["Ingress"],
        "ingress": [{"from": [_pods(cluster, "router"), _readers(cluster)], "ports": [_tcp(PORT)]}],
    }
    if pair:
        other = _pods(cluster, OTHER[role])
        spec["policyTypes"].append("Egress")
        spec["ingress"].append({"from": [other], "ports": _of_transfer(role)})
        resolves = [{"port": DNS, "protocol": protocol} for protocol in ("UDP", "TCP")]
        spec["egress"] = [{"to": [other], "ports": _of_transfer(OTHER[role])}, {"ports": resolves}]
        if cluster.model_volume is None:
            spec["egress"].append({"ports": [_tcp(443)]})  # the hub's
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": cluster.metadata(role),
        "spec": spec,
    }


def _of_transfer(role: Role) -> list[Manifest]:
    """Ports of a server of this role that the other role opens connections to."""
    bootstrap = [_tcp(BOOTSTRAP)] if role == "prefill" else []
    return [*bootstrap, *(_tcp(first) | {"endPort": last} for first, last in (MOONCAKE, CONTROL))]


def _pods(cluster: Cluster, part: str) -> Manifest:
    return {"podSelector": {"matchLabels": cluster.labels(part)}}


def _readers(cluster: Cluster) -> Manifest:
    names = {"kubernetes.io/metadata.name": cluster.metrics_namespace}
    return {"namespaceSelector": {"matchLabels": names}}


def _tcp(port: int) -> Manifest:
    return {"port": port, "protocol": "TCP"}
