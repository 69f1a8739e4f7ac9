"""The router's Deployment, and what lets it see pods."""

from sglang_hma.planner.deployment import ROUTER_PORT
from sglang_hma.planner.kubernetes.cluster import Cluster, Manifest
from sglang_hma.planner.kubernetes.fleet import Fleet
from sglang_hma.planner.kubernetes.server_pod import (
    contained,
    from_pod,
    preferably,
    probe,
    unprivileged,
    waits_first,
)

ROUTERS = 2
# A router waits for requests under way (--shutdown-grace-period-secs, 180) after it has left the
# Service's endpoints.
ROUTER_LEAVES_S, ROUTER_GRACE_S = 5, 200
ROUTER_METRICS = 29000  # sglang_router's own default


def routers(fleet: Fleet, cluster: Cluster) -> Manifest:
    labels = cluster.labels("router")
    container = {
        "name": "router",
        "image": cluster.image_of("router"),
        "command": list(fleet.router),
        "env": [from_pod("POD_NAMESPACE", "metadata.namespace")],
        "ports": [
            {"name": "http", "containerPort": ROUTER_PORT},
            {"name": "metrics", "containerPort": ROUTER_METRICS},
        ],
        "startupProbe": probe("/liveness", 5, 5, 60),  # it imports SGLang first
        "readinessProbe": probe("/readiness", 5, 5, 3),
        "livenessProbe": probe("/liveness", 10, 5, 3),
        "resources": {"requests": {"cpu": "1", "memory": "1Gi"}},
        "securityContext": contained(),
        "lifecycle": waits_first(ROUTER_LEAVES_S),
    }
    apart = {"labelSelector": {"matchLabels": labels}, "topologyKey": "kubernetes.io/hostname"}
    pod: Manifest = {
        "terminationGracePeriodSeconds": ROUTER_GRACE_S,
        "securityContext": unprivileged(),
        "affinity": {"podAntiAffinity": preferably(apart)},
        "containers": [container],
    }
    if cluster.discovery:
        pod["serviceAccountName"] = cluster.part("router")
    else:
        pod["automountServiceAccountToken"] = False
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": cluster.metadata("router"),
        "spec": {
            "replicas": ROUTERS,
            "selector": {"matchLabels": labels},
            "template": {
                "metadata": {"labels": labels, "annotations": scraped(ROUTER_METRICS)},
                "spec": pod,
            },
        },
    }


def sees_pods(cluster: Cluster) -> list[Manifest]:
    """An account for the router that lists the pods of its namespace, and nothing else."""
    name = cluster.part("router")
    rule = {"apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list", "watch"]}
    group = "rbac.authorization.k8s.io"
    return [
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": cluster.metadata("router")},
        {
            "apiVersion": f"{group}/v1",
            "kind": "Role",
            "metadata": cluster.metadata("router"),
            "rules": [rule],
        },
        {
            "apiVersion": f"{group}/v1",
            "kind": "RoleBinding",
            "metadata": cluster.metadata("router"),
            "roleRef": {"apiGroup": group, "kind": "Role", "name": name},
            "subjects": [
                {"kind": "ServiceAccount", "name": name}
                | ({"namespace": cluster.namespace} if cluster.namespace else {})
            ],
        },
    ]


def scraped(port: int) -> dict[str, str]:
    return {
        "prometheus.io/scrape": "true",
        "prometheus.io/port": str(port),
        "prometheus.io/path": "/metrics",
    }
