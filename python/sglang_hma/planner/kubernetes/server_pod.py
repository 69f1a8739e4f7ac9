"""The pod of one server: its command, devices, volumes and probes."""

from sglang_hma.planner.deployment import BOOTSTRAP, PORT, Plan, Role, server
from sglang_hma.planner.kubernetes.cluster import Cluster, Manifest

# SGLang's /health makes a token and waits for it 20 s at most (SGLANG_HEALTH_CHECK_TIMEOUT).
HEALTH_TIMEOUT_S = 25
# Only the claimed cards are in the pod, under the numbers that they have on the host.
NAME_CARDS = (
    'exec "$@" --hma-device-ids "$(ls /dev/tenstorrent | grep -E \'^[0-9]+$\' | paste -sd, -)"'
)
HUGE_PAGES = "/dev/hugepages-1G"


def server_pod(plan: Plan, cluster: Cluster, role: Role) -> Manifest:
    """Its spec. SIGTERM makes a server finish the requests that it has, then end."""
    gddr = _on_gddr(plan, role)
    claims = claims_cards(plan, cluster, role)
    command = server(plan, role, card_ids=not gddr)
    if gddr:
        started: Manifest = {"command": ["sh", "-c", NAME_CARDS, "sh"], "args": command}
    else:
        started = {"command": command}
    volumes, mounts = _volumes(plan, cluster, huge_pages=gddr and not claims)
    ports = [{"name": "http", "containerPort": PORT}]
    if role == "prefill":
        ports.append({"name": "bootstrap", "containerPort": BOOTSTRAP})
    container: Manifest = {
        "name": "server",
        "image": cluster.image,
        **started,
        "ports": ports,
        "startupProbe": probe("/health", 10, HEALTH_TIMEOUT_S, 6 * cluster.startup_minutes),
        "readinessProbe": probe("/ready", 5, 5, 3),
        "livenessProbe": probe("/health", 30, HEALTH_TIMEOUT_S, 5),
        "resources": _resources(plan, cluster, role),
        "volumeMounts": mounts,
    }
    if cluster.rdma_resource:
        container["securityContext"] = {"capabilities": {"add": ["IPC_LOCK"]}}
    pod: Manifest = {
        "terminationGracePeriodSeconds": cluster.grace_seconds,
        "containers": [container],
        "volumes": volumes,
    }
    if claims:
        name = claim_name(cluster)
        pod["resourceClaims"] = [{"name": "cards", "resourceClaimTemplateName": name}]
    if cluster.host_network:
        pod |= _host_network(cluster)
    return pod


def _host_network(cluster: Cluster) -> Manifest:
    """All servers have the same ports: no two on one node."""
    term = {"labelSelector": cluster.servers, "topologyKey": "kubernetes.io/hostname"}
    return {
        "hostNetwork": True,
        "dnsPolicy": "ClusterFirstWithHostNet",
        "affinity": {"podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [term]}},
    }


def _volumes(
    plan: Plan, cluster: Cluster, *, huge_pages: bool
) -> tuple[list[Manifest], list[Manifest]]:
    """And where they are mounted."""
    memory = {"medium": "Memory", "sizeLimit": cluster.shared_memory}
    volumes: list[Manifest] = [{"name": "shm", "emptyDir": memory}]
    mounts: list[Manifest] = [{"name": "shm", "mountPath": "/dev/shm"}]
    if cluster.model_volume:
        volumes.append({"name": "models", **cluster.model_volume})
        folder = plan.model.rstrip("/").rpartition("/")[0]
        mounts.append({"name": "models", "mountPath": folder, "readOnly": True})
    if huge_pages:
        volumes.append({"name": "hugepages", "hostPath": {"path": HUGE_PAGES}})
        mounts.append({"name": "hugepages", "mountPath": HUGE_PAGES})
    return volumes, mounts


def _resources(plan: Plan, cluster: Cluster, role: Role) -> Manifest:
    found: Manifest = {}
    limits = {}
    if not _on_gddr(plan, role):
        limits[cluster.hbm_resource] = str(plan.site.hbm_cards)
    elif cluster.gddr_resource:
        limits[cluster.gddr_resource] = str(plan.site.gddr_cards)
    else:
        found["claims"] = [{"name": "cards"}]
    if cluster.rdma_resource:
        limits[cluster.rdma_resource] = "1"
    return found | ({"limits": limits} if limits else {})


def _on_gddr(plan: Plan, role: Role) -> bool:
    return role == "prefill" and plan.on_gddr


def claims_cards(plan: Plan, cluster: Cluster, role: Role) -> bool:
    """Whether its GDDR cards come from a claim."""
    return _on_gddr(plan, role) and cluster.gddr_resource is None


def claim_name(cluster: Cluster) -> str:
    return f"{cluster.part('prefill')}-cards"


def probe(path: str, period_s: int, timeout_s: int, failures: int) -> Manifest:
    return {
        "httpGet": {"path": path, "port": "http"},
        "periodSeconds": period_s,
        "timeoutSeconds": timeout_s,
        "failureThreshold": failures,
    }
