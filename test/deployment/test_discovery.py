"""The real router, as the manifests start it, before a stand-in for Kubernetes' API."""

import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml

from scripts import kubernetes_files

from ..e2e.harness import Process, free_port, until
from .documents import Deployed, Document, flags_of
from .stand_in_cluster import Api, StandInServer, listening

pytestmark = pytest.mark.slow

NAMESPACE = "serving"
# One port for all servers, so each needs an address; every Linux host has these.
ADDRESSES = {"prefill": "127.0.0.2", "decode": "127.0.0.3"}


@dataclass
class Cluster:
    deployed: Deployed
    api: Api
    servers: dict[str, StandInServer]
    router: Process
    url: str

    def tell(self, role: str, *, ready: bool, ends: bool = False) -> None:
        """Of the one pod of a role, made from the manifests' template."""
        name = self.deployed.of_role(role)
        about: Document = {"name": f"{name}-0", "namespace": NAMESPACE, "uid": role}
        about |= self.deployed.pods[name]["metadata"]
        if ends:
            about["deletionTimestamp"] = "2026-01-01T00:00:00Z"
        state = {"type": "Ready", "status": str(ready)}
        status = {"phase": "Running", "podIP": ADDRESSES[role], "conditions": [state]}
        self.api.set({"metadata": about, "spec": {"containers": []}, "status": status})

    def workers(self) -> dict[str, dict[str, Any]]:
        """What the router knows, by role; nothing before it answers."""
        with contextlib.suppress(requests.ConnectionError):
            found = requests.get(f"{self.url}/workers").json()["workers"]
            return {each["worker_type"]: each for each in found}
        return {}

    def wait_for(self, *roles: str) -> None:
        until(lambda: set(self.workers()) == set(roles), self.router)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    deployed = Deployed(kubernetes_files.overlays()["overlays/cpu"].manifests())
    api, servers = Api(NAMESPACE), {role: StandInServer() for role in ADDRESSES}
    with contextlib.ExitStack() as stack:
        account = tmp_path / "kubeconfig"
        account.write_text(yaml.safe_dump(kubeconfig(stack.enter_context(api.serve()))))
        port = 0
        for role, server in servers.items():
            handler = server.handler()
            listener = stack.enter_context(listening(handler, ADDRESSES[role], port))
            port = listener.server_address[1]
        flags = flags_of(deployed.container(deployed.router))
        flags = [word.replace("$(POD_NAMESPACE)", NAMESPACE) for word in flags]
        own, metrics = free_port(), free_port()
        flags += ["--host", "127.0.0.1", "--port", str(own), "--prometheus-port", str(metrics)]
        flags += ["--service-discovery-port", str(port)]
        command = [sys.executable, "-m", "sglang_hma.launch.router", *flags]
        env = {
            "KUBECONFIG": str(account),
            "NO_PROXY": os.environ.get("NO_PROXY", "") + ",127.0.0.1",
        }
        router = Process("discovery-router", command, tmp_path / "router.log", env).start()
        stack.callback(router.stop)
        yield Cluster(deployed, api, servers, router, f"http://127.0.0.1:{own}")


def kubeconfig(url: str) -> Document:
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "it", "cluster": {"server": url}}],
        "users": [{"name": "it", "user": {}}],
        "contexts": [{"name": "it", "context": {"cluster": "it", "user": "it"}}],
        "current-context": "it",
    }


def test_pods_come_and_go(cluster: Cluster) -> None:
    """Ready ones are asked, with the bootstrap port of the annotation, and none that is to end."""
    cluster.tell("prefill", ready=False)
    cluster.tell("decode", ready=True)
    cluster.wait_for("decode")
    cluster.tell("prefill", ready=True)
    cluster.wait_for("prefill", "decode")
    until(lambda: requests.get(f"{cluster.url}/readiness").ok, cluster.router)
    reply = requests.post(f"{cluster.url}/generate", json={"text": "x"})
    assert reply.status_code == 200, reply.text
    (asked,), (also,) = (server.asked for server in cluster.servers.values())
    assert asked["bootstrap_host"] == also["bootstrap_host"] == ADDRESSES["prefill"]
    bootstrap = cluster.deployed.arguments("hma-prefill").disaggregation_bootstrap_port
    assert asked["bootstrap_port"] == also["bootstrap_port"] == bootstrap
    assert asked["bootstrap_room"] == also["bootstrap_room"]
    cluster.tell("prefill", ready=True, ends=True)
    cluster.wait_for("decode")
    assert requests.post(f"{cluster.url}/generate", json={"text": "x"}).status_code == 503


def test_a_pod_that_was_not_ready_at_its_end_stays(cluster: Cluster) -> None:
    """Until somebody takes it out: a limit of sglang_router 0.3.2 that docs/deployment.md names.

    Readiness therefore asks for no token: a pod that is busy must not stop being ready.
    """
    for role in ADDRESSES:
        cluster.tell(role, ready=True)
    cluster.wait_for("prefill", "decode")
    cluster.tell("prefill", ready=False)
    cluster.tell("prefill", ready=False, ends=True)
    cluster.tell("decode", ready=True, ends=True)  # told later, seen later
    cluster.wait_for("prefill")
    stale = cluster.workers()["prefill"]["id"]
    assert requests.delete(f"{cluster.url}/workers/{stale}").ok
    cluster.wait_for()
    assert requests.get(f"{cluster.url}/workers").json()["workers"] == []
