"""The pod of one server: its command, devices, volumes and probes."""

from pathlib import PurePosixPath

from sglang_hma.launch.defaults import LIVE_PATH
from sglang_hma.planner.deployment import BOOTSTRAP, PORT, SECRET_FILE, Role
from sglang_hma.planner.kubernetes.cluster import Cluster, Manifest
from sglang_hma.planner.kubernetes.fleet import Devices, Fleet

# SGLang's /health makes a token and waits for it 20 s at most (SGLANG_HEALTH_CHECK_TIMEOUT).
HEALTH_TIMEOUT_S = 25
# Only the claimed cards are in the pod, under the numbers that they have on the host.
NAME_CARDS = (
    'exec "$@" --hma-device-ids "$(ls /dev/tenstorrent | grep -E \'^[0-9]+$\' | paste -sd, -)"'
)
HUGE_PAGES = "/dev/hugepages-1G"
SECRET_MODE = 0o440  # the pod's group reads it, nobody else
USER = 10001  # of deploy/containers
# The router takes a server out when it sees that its pod is to end; only then comes SIGTERM.
ROUTER_SEES_S = 5


def server_pod(fleet: Fleet, cluster: Cluster, role: Role) -> Manifest:
    """Its spec. SIGTERM makes a server finish the requests that it has, then end."""
    devices = fleet.devices[role]
    volumes, mounts = _volumes(fleet, cluster, devices)
    ports = [{"name": "http", "containerPort": PORT}]
    if role == "prefill":
        ports.append({"name": "bootstrap", "containerPort": BOOTSTRAP})
    container: Manifest = {
        "name": "server",
        "image": cluster.image_of(role),
        **_started(fleet, cluster, role),
        "env": [from_pod("POD_IP", "status.podIP")],
        "ports": ports,
        "startupProbe": probe("/health", 10, HEALTH_TIMEOUT_S, 6 * cluster.startup_minutes),
        "readinessProbe": probe("/ready", 5, 5, 3),
        "livenessProbe": _liveness(fleet),
        "resources": _resources(cluster, devices),
        "securityContext": contained(*(["IPC_LOCK"] if cluster.rdma_resource else [])),
        "volumeMounts": mounts,
    }
    if cluster.discovery:
        container["lifecycle"] = waits_first(ROUTER_SEES_S)
    pod: Manifest = {
        "terminationGracePeriodSeconds": cluster.grace_seconds,
        "automountServiceAccountToken": False,
        "securityContext": unprivileged(),
        "affinity": {"podAntiAffinity": _apart(cluster, role)},
        "containers": [container],
        "volumes": volumes,
    }
    if devices.claimed:
        name = claim_name(cluster)
        pod["resourceClaims"] = [{"name": "cards", "resourceClaimTemplateName": name}]
    if cluster.host_network:
        pod |= {"hostNetwork": True, "dnsPolicy": "ClusterFirstWithHostNet"}
    return pod


def _started(fleet: Fleet, cluster: Cluster, role: Role) -> Manifest:
    """A container's command and args."""
    command = list(fleet.commands[role])
    if not fleet.stock:
        command += ["--hma-drain-timeout", str(cluster.drain_seconds)]
    if fleet.devices[role].cards:
        return {"command": ["sh", "-c", NAME_CARDS, "sh"], "args": command}
    return {"command": command}


def _liveness(fleet: Fleet) -> Manifest:
    """A busy server answers LIVE_PATH at once, and 503 if a process of it is stopped or gone.
    SGLang's own launcher has only /health, which waits for the pass that is running."""
    if fleet.stock:
        return probe("/health", 30, HEALTH_TIMEOUT_S, 5)
    return probe(LIVE_PATH, 10, 5, 6)


def _apart(cluster: Cluster, role: Role) -> Manifest:
    """A node's end takes few servers of a role. In the node's network all have the same ports, and
    no two of them can be on one node."""
    where = {"topologyKey": "kubernetes.io/hostname"}
    if cluster.host_network:
        return {
            "requiredDuringSchedulingIgnoredDuringExecution": [
                {"labelSelector": cluster.servers, **where}
            ]
        }
    return preferably({"labelSelector": {"matchLabels": cluster.labels(role)}, **where})


def preferably(term: Manifest) -> Manifest:
    return {
        "preferredDuringSchedulingIgnoredDuringExecution": [
            {"weight": 100, "podAffinityTerm": term}
        ]
    }


def _volumes(
    fleet: Fleet, cluster: Cluster, devices: Devices
) -> tuple[list[Manifest], list[Manifest]]:
    """And where they are mounted."""
    memory = {"medium": "Memory", "sizeLimit": cluster.shared_memory}
    volumes: list[Manifest] = [{"name": "shm", "emptyDir": memory}]
    mounts: list[Manifest] = [{"name": "shm", "mountPath": "/dev/shm"}]
    if not fleet.stock:
        source = {"secretName": cluster.secret, "defaultMode": SECRET_MODE}
        file = PurePosixPath(SECRET_FILE)
        item = {"key": "secret", "path": file.name}
        volumes.append({"name": "cluster-secret", "secret": {**source, "items": [item]}})
        place = {"mountPath": str(file.parent), "readOnly": True}
        mounts.append({"name": "cluster-secret", **place})
    if cluster.model_volume:
        volumes.append({"name": "models", **cluster.model_volume})
        folder = fleet.model.rstrip("/").rpartition("/")[0]
        mounts.append({"name": "models", "mountPath": folder, "readOnly": True})
    if devices.cards and not devices.claimed:
        volumes.append({"name": "hugepages", "hostPath": {"path": HUGE_PAGES}})
        mounts.append({"name": "hugepages", "mountPath": HUGE_PAGES})
    return volumes, mounts


def _resources(cluster: Cluster, devices: Devices) -> Manifest:
    found: Manifest = {"requests": {"cpu": cluster.server_cpus, "memory": cluster.server_memory}}
    if devices.limits:
        found["limits"] = dict(devices.limits)
    if devices.claimed:
        found["claims"] = [{"name": "cards"}]
    return found


def claim_name(cluster: Cluster) -> str:
    return f"{cluster.part('prefill')}-cards"


def unprivileged() -> Manifest:
    """Of a pod."""
    return {
        "runAsNonRoot": True,
        "runAsUser": USER,
        "runAsGroup": USER,
        "fsGroup": USER,
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def contained(*capabilities: str) -> Manifest:
    """Of a container."""
    allowed: Manifest = {"drop": ["ALL"]} | ({"add": [*capabilities]} if capabilities else {})
    return {"allowPrivilegeEscalation": False, "capabilities": allowed}


def waits_first(seconds: int) -> Manifest:
    """A container's lifecycle, with so long between the pod's end being said and SIGTERM."""
    return {"preStop": {"exec": {"command": ["sleep", str(seconds)]}}}


def from_pod(name: str, field: str) -> Manifest:
    """An environment variable, for commands to name as $(name)."""
    return {"name": name, "valueFrom": {"fieldRef": {"fieldPath": field}}}


def probe(path: str, period_s: int, timeout_s: int, failures: int) -> Manifest:
    return {
        "httpGet": {"path": path, "port": "http"},
        "periodSeconds": period_s,
        "timeoutSeconds": timeout_s,
        "failureThreshold": failures,
    }
