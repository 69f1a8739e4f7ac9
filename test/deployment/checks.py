"""What must hold of manifests, whoever printed them."""

from pathlib import PurePosixPath

from sglang.srt.entrypoints import http_server

from sglang_hma.launch.defaults import LIVE_PATH

from .documents import Deployed, Document, named_ports, routes, variables

PROBES = ("startupProbe", "readinessProbe", "livenessProbe")
# sglang_router's own, and those of its server
ROUTERS_PATHS = {"/readiness", "/liveness"}
MONITORING = "kubernetes.io/metadata.name"


def check(deployed: Deployed, *, stock: bool = False) -> None:
    """stock: SGLang's own launcher starts the servers."""
    deployed.validate()
    check_selectors(deployed)
    check_ports(deployed)
    check_probes(deployed, stock=stock)
    check_privileges(deployed)
    check_policies(deployed, pair=not stock)
    if not stock:
        check_secret(deployed)
        check_end(deployed)


def check_selectors(deployed: Deployed) -> None:
    for name, maker in {**deployed.kind("StatefulSet"), **deployed.kind("Deployment")}.items():
        assert deployed.selected(maker["spec"]["selector"]) == {name}
    for name, service in deployed.kind("Service").items():
        assert deployed.selected({"matchLabels": service["spec"]["selector"]}) == {name}
    budgets = deployed.kind("PodDisruptionBudget")
    assert set(budgets) == set(deployed.pods)
    for name, budget in budgets.items():
        assert deployed.selected(budget["spec"]["selector"]) == {name}
        assert budget["spec"]["maxUnavailable"] == 1
    for name in deployed.pods:
        check_apart(deployed, name)


def check_apart(deployed: Deployed, name: str) -> None:
    pod = deployed.pods[name]["spec"]
    rules = pod["affinity"]["podAntiAffinity"]
    if pod.get("hostNetwork"):
        (term,) = rules["requiredDuringSchedulingIgnoredDuringExecution"]
        others = set(deployed.sets)
    else:
        (preferred,) = rules["preferredDuringSchedulingIgnoredDuringExecution"]
        term, others = preferred["podAffinityTerm"], {name}
    assert deployed.selected(term["labelSelector"]) == others
    assert term["topologyKey"] == "kubernetes.io/hostname"


def check_ports(deployed: Deployed) -> None:
    for name, service in deployed.kind("Service").items():
        ports = named_ports(deployed.container(name))
        for port in service["spec"]["ports"]:
            assert ports[port["targetPort"]] == port["port"]
    for name in deployed.sets:
        container, args = deployed.container(name), deployed.arguments(name)
        ports = named_ports(container)
        assert args.port == ports["http"]
        assert (args.host, variables(container)["POD_IP"]) == ("$(POD_IP)", "status.podIP")
        annotations = deployed.pods[name]["metadata"]["annotations"]
        assert annotations["prometheus.io/port"] == str(args.port)
        if args.disaggregation_mode == "prefill":
            assert args.disaggregation_bootstrap_port == ports["bootstrap"]
            assert annotations["sglang.ai/bootstrap-port"] == str(ports["bootstrap"])
    container = deployed.container(deployed.router)
    router, ports = routes(container), named_ports(container)
    assert (router.port, router.prometheus_port) == (ports["http"], ports["metrics"])


def check_probes(deployed: Deployed, *, stock: bool) -> None:
    """A busy server is no dead one: what ends a pod asks for no token."""
    theirs = {getattr(route, "path", "") for route in http_server.app.routes}
    for name in deployed.sets:
        container = deployed.container(name)
        paths = {probe: container[probe]["httpGet"]["path"] for probe in PROBES}
        assert set(paths.values()) <= {*theirs, LIVE_PATH}
        assert paths["livenessProbe"] == ("/health" if stock else LIVE_PATH)
        assert paths["startupProbe"] == "/health"
        for probe in PROBES:
            port = named_ports(container)[container[probe]["httpGet"]["port"]]
            assert port == deployed.arguments(name).port
    router = deployed.container(deployed.router)
    assert {router[probe]["httpGet"]["path"] for probe in PROBES} == ROUTERS_PATHS
    live = not stock
    assert (routes(router).health_check_endpoint == LIVE_PATH) == live


def check_privileges(deployed: Deployed) -> None:
    for name, pod in deployed.pods.items():
        spec, container = pod["spec"], deployed.container(name)
        context = spec["securityContext"]
        assert context["runAsNonRoot"] and context["runAsUser"] == context["fsGroup"] > 0
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}
        allowed = container["securityContext"]
        assert not allowed["allowPrivilegeEscalation"]
        assert allowed["capabilities"]["drop"] == ["ALL"]
        has_account = "serviceAccountName" in spec
        assert has_account or spec["automountServiceAccountToken"] is False
        assert not has_account or name == deployed.router
        assert set(container["resources"]["requests"]) == {"cpu", "memory"}


def check_policies(deployed: Deployed, *, pair: bool) -> None:
    """Router to servers, prefill to decode and back, and nothing else."""
    policies = deployed.kind("NetworkPolicy")
    assert set(policies) == set(deployed.sets)
    for name, policy in policies.items():
        spec = policy["spec"]
        assert deployed.selected(spec["podSelector"]) == {name}
        http, *transfer = spec["ingress"]
        router, readers = http["from"]
        assert deployed.selected(router["podSelector"]) == {deployed.router}
        assert set(readers["namespaceSelector"]["matchLabels"]) == {MONITORING}
        assert http["ports"] == [{"port": deployed.arguments(name).port, "protocol": "TCP"}]
        if not pair:
            assert transfer == [] and spec["policyTypes"] == ["Ingress"]
            continue
        assert spec["policyTypes"] == ["Ingress", "Egress"]
        (between,) = transfer
        (other,) = set(deployed.sets) - {name}
        check_transfer(deployed, between, "from", other, name)
        out, names, *hub = spec["egress"]
        check_transfer(deployed, out, "to", other, other)
        assert [each["port"] for each in names["ports"]] == [53, 53]
        local = deployed.arguments(name).model_path.startswith("/")
        assert [each["ports"] for each in hub] == [[{"port": 443, "protocol": "TCP"}]] * (not local)


def check_transfer(deployed: Deployed, rule: Document, end: str, peer: str, listener: str) -> None:
    """A rule for `peer` alone, with the ports of `listener`'s transfer and not its HTTP port."""
    (who,) = rule[end]
    assert deployed.selected(who["podSelector"]) == {peer}
    args = deployed.arguments(listener)
    ports = [(each["port"], each.get("endPort", each["port"])) for each in rule["ports"]]
    assert {each["protocol"] for each in rule["ports"]} == {"TCP"}
    assert not any(first <= args.port <= last for first, last in ports)
    prefills = args.disaggregation_mode == "prefill"
    bootstrap = args.disaggregation_bootstrap_port
    assert any(first <= bootstrap <= last for first, last in ports) == prefills
    assert ports[prefills:] == [(15000, 17000), (32768, 65535)]


def check_secret(deployed: Deployed) -> None:
    """The file that the servers read is there, and its pod's group alone reads it."""
    for name in deployed.sets:
        file = PurePosixPath(deployed.arguments(name).hma_cluster_secret_file)
        container, spec = deployed.container(name), deployed.pods[name]["spec"]
        (mount,) = (each for each in container["volumeMounts"] if each["name"] == "cluster-secret")
        assert mount["mountPath"] == str(file.parent) and mount["readOnly"]
        (volume,) = (each for each in spec["volumes"] if each["name"] == "cluster-secret")
        assert volume["secret"]["items"] == [{"key": "secret", "path": file.name}]
        assert volume["secret"]["defaultMode"] == 0o440
    assert not any("volumes" in deployed.pods[name]["spec"] for name in (deployed.router,))
    assert not deployed.kind("Secret")


def check_end(deployed: Deployed) -> None:
    """Kubernetes waits longer than a server drains."""
    for name in deployed.sets:
        grace = deployed.pods[name]["spec"]["terminationGracePeriodSeconds"]
        assert grace >= deployed.arguments(name).hma_drain_timeout + 30
    router = deployed.pods[deployed.router]["spec"]["terminationGracePeriodSeconds"]
    assert router > routes(deployed.container(deployed.router)).shutdown_grace_period_secs


def check_discovery(deployed: Deployed) -> None:
    """The router's selectors mean the servers, and it may see them."""
    pod = deployed.pods[deployed.router]["spec"]
    container = deployed.container(deployed.router)
    router = routes(container)
    assert router.service_discovery and router.pd_disaggregation
    assert router.service_discovery_namespace == "$(POD_NAMESPACE)"
    assert variables(container)["POD_NAMESPACE"] == "metadata.namespace"
    assert not router.prefill_urls and not router.decode_urls
    for role, labels in (("prefill", router.prefill_selector), ("decode", router.decode_selector)):
        name = deployed.of_role(role)
        assert deployed.selected({"matchLabels": labels}) == {name}
        assert deployed.arguments(name).port == router.service_discovery_port
        assert deployed.arguments(name).hma_prefill_peers is None
    (account,), (role,) = deployed.kind("ServiceAccount"), deployed.kind("Role").values()
    (binding,) = deployed.kind("RoleBinding").values()
    assert pod["serviceAccountName"] == account
    assert [subject["name"] for subject in binding["subjects"]] == [account]
    assert binding["roleRef"]["name"] == role["metadata"]["name"]
    (rule,) = role["rules"]
    assert rule["resources"] == ["pods"] and rule["verbs"] == ["get", "list", "watch"]
