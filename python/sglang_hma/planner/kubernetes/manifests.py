"""Kubernetes manifests of a mix: servers as StatefulSets, the router as a Deployment.

The router is given its servers by name, so they need names that outlive a pod: a StatefulSet's
behind a headless Service.
"""

from typing import Any

import yaml

from sglang_hma.planner.deployment import BOOTSTRAP, PORT, ROUTER_PORT, Plan, Role, router
from sglang_hma.planner.kubernetes.cluster import Cluster, Manifest
from sglang_hma.planner.kubernetes.server_pod import claim_name, claims_cards, probe, server_pod

# The router waits for requests under way (--shutdown-grace-period-secs, 180) after it has left the
# Service's endpoints.
ROUTER_LEAVES_S, ROUTER_GRACE_S = 5, 200
ROUTER_METRICS = 29000  # sglang_router's own default


class Plain(yaml.SafeDumper):
    """Says what is equal twice, without anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def text(plan: Plan, cluster: Cluster) -> str:
    """All of them as YAML documents."""
    found = manifests(plan, cluster)
    return str(yaml.dump_all(found, Dumper=Plain, sort_keys=False, width=100))


def manifests(plan: Plan, cluster: Cluster) -> list[Manifest]:
    found = []
    for role, count in plan.roles.items():
        if claims_cards(plan, cluster, role):
            found.append(_claim_template(plan, cluster))
        found += [_headless(cluster, role), _stateful_set(plan, cluster, role, count)]
    if plan.prefill:
        found.append(_policy(cluster))
    return [*found, _router_service(cluster), _router(plan, cluster)]


def _stateful_set(plan: Plan, cluster: Cluster, role: Role, count: int) -> Manifest:
    labels = cluster.labels(role)
    return {
        "apiVersion": "apps/v1",
        "kind": "StatefulSet",
        "metadata": cluster.metadata(role),
        "spec": {
            "serviceName": cluster.part(role),
            "replicas": count,
            "podManagementPolicy": "Parallel",
            "selector": {"matchLabels": labels},
            "template": {
                "metadata": {"labels": labels, "annotations": _scraped(PORT)},
                "spec": server_pod(plan, cluster, role),
            },
        },
    }


def _claim_template(plan: Plan, cluster: Cluster) -> Manifest:
    """The vendor's DRA driver publishes cards in the class tenstorrent.com
    (docs.tenstorrent.com/tt-dra-driver)."""
    board = f'device.attributes["tenstorrent.com"].boardName == "{cluster.board}"'
    cards = {
        "deviceClassName": "tenstorrent.com",
        "count": plan.site.gddr_cards,
        "selectors": [{"cel": {"expression": board}}],
    }
    return {
        "apiVersion": "resource.k8s.io/v1",
        "kind": "ResourceClaimTemplate",
        "metadata": cluster.metadata("prefill", claim_name(cluster)),
        "spec": {"spec": {"devices": {"requests": [{"name": "cards", "exactly": cards}]}}},
    }


def _headless(cluster: Cluster, role: Role) -> Manifest:
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


def _policy(cluster: Cluster) -> Manifest:
    """Whoever reaches Mooncake's ports can read and write KV pages: only this mix's servers do. The
    HTTP port is open, to the router and to who reads metrics."""
    http = [{"port": PORT, "protocol": "TCP"}]
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": cluster.metadata("servers"),
        "spec": {
            "podSelector": cluster.servers,
            "policyTypes": ["Ingress"],
            "ingress": [{"from": [{"podSelector": cluster.servers}]}, {"ports": http}],
        },
    }


def _router_service(cluster: Cluster) -> Manifest:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": cluster.metadata("router"),
        "spec": {
            "selector": cluster.labels("router"),
            "ports": [{"name": "http", "port": ROUTER_PORT, "targetPort": "http"}],
        },
    }


def _router(plan: Plan, cluster: Cluster) -> Manifest:
    labels = cluster.labels("router")
    waits = ("--worker-startup-timeout-secs", str(60 * cluster.startup_minutes))
    container = {
        "name": "router",
        "image": cluster.image,
        "command": router(plan, cluster.host, *waits),
        "ports": [
            {"name": "http", "containerPort": ROUTER_PORT},
            {"name": "metrics", "containerPort": ROUTER_METRICS},
        ],
        "readinessProbe": probe("/readiness", 5, 5, 3),
        "livenessProbe": probe("/liveness", 10, 5, 3),
        "lifecycle": {"preStop": {"exec": {"command": ["sleep", str(ROUTER_LEAVES_S)]}}},
    }
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": cluster.metadata("router"),
        "spec": {
            "replicas": 1,
            "selector": {"matchLabels": labels},
            "template": {
                "metadata": {"labels": labels, "annotations": _scraped(ROUTER_METRICS)},
                "spec": {
                    "terminationGracePeriodSeconds": ROUTER_GRACE_S,
                    "containers": [container],
                },
            },
        },
    }


def _scraped(port: int) -> dict[str, str]:
    return {
        "prometheus.io/scrape": "true",
        "prometheus.io/port": str(port),
        "prometheus.io/path": "/metrics",
    }
