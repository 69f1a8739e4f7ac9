"""Kubernetes manifests of a fleet: servers as StatefulSets, the routers as a Deployment.

A StatefulSet's pod keeps its name, and a new one takes an old one's place only when its devices are
free. `deploy/kubernetes` is written from these same functions (scripts/kubernetes_files.py).
"""

from typing import Any

import yaml

from sglang_hma.planner.deployment import BOOTSTRAP, PORT, Role
from sglang_hma.planner.kubernetes.cluster import Cluster, Manifest
from sglang_hma.planner.kubernetes.fleet import Fleet
from sglang_hma.planner.kubernetes.network import headless, policy, router_service
from sglang_hma.planner.kubernetes.router_pods import routers, scraped, sees_pods
from sglang_hma.planner.kubernetes.server_pod import claim_name, server_pod

# Where the router looks for a prefill pod's bootstrap port; it has no flag for the name.
BOOTSTRAP_ANNOTATION = "sglang.ai/bootstrap-port"


class Plain(yaml.SafeDumper):
    """Says what is equal twice, without anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def as_yaml(documents: list[Manifest]) -> str:
    return str(yaml.dump_all(documents, Dumper=Plain, sort_keys=False, width=100))


def manifests(fleet: Fleet, cluster: Cluster) -> list[Manifest]:
    found = []
    for role, count in fleet.replicas.items():
        if claimed := fleet.devices[role].claimed:
            found.append(_claim_template(cluster, claimed))
        found += [headless(cluster, role), _stateful_set(fleet, cluster, role, count)]
        found.append(policy(cluster, role, pair=not fleet.stock))
        found.append(_disruptions(cluster, role))
    if cluster.discovery:
        found += sees_pods(cluster)
    found += [router_service(cluster), routers(fleet, cluster)]
    return [*found, _disruptions(cluster, "router")]


def _stateful_set(fleet: Fleet, cluster: Cluster, role: Role, count: int) -> Manifest:
    labels, annotations = cluster.labels(role), scraped(PORT)
    if role == "prefill":
        annotations[BOOTSTRAP_ANNOTATION] = str(BOOTSTRAP)
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
                "metadata": {"labels": labels, "annotations": annotations},
                "spec": server_pod(fleet, cluster, role),
            },
        },
    }


def _claim_template(cluster: Cluster, count: int) -> Manifest:
    """The vendor's DRA driver publishes cards in the class tenstorrent.com
    (docs.tenstorrent.com/tt-dra-driver)."""
    board = f'device.attributes["tenstorrent.com"].boardName == "{cluster.board}"'
    cards = {
        "deviceClassName": "tenstorrent.com",
        "count": count,
        "selectors": [{"cel": {"expression": board}}],
    }
    return {
        "apiVersion": "resource.k8s.io/v1",
        "kind": "ResourceClaimTemplate",
        "metadata": cluster.metadata("prefill", claim_name(cluster)),
        "spec": {"spec": {"devices": {"requests": [{"name": "cards", "exactly": cards}]}}},
    }


def _disruptions(cluster: Cluster, part: str) -> Manifest:
    """Nodes that are emptied take one pod of a kind after the other."""
    return {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": cluster.metadata(part),
        "spec": {"maxUnavailable": 1, "selector": {"matchLabels": cluster.labels(part)}},
    }
