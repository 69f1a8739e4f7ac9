"""The manifests that `deploy` prints: Kubernetes' own schemas, SGLang's parsers, and each other."""

import argparse
import re
import shlex
import subprocess
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import kubernetes_validate
import pytest
import yaml
from sglang_router.router_args import RouterArgs

from sglang_hma.launch import arguments
from sglang_hma.planner.__main__ import main
from sglang_hma.planner.deployment import DEPLOYABLE
from sglang_hma.planner.kubernetes.cluster import board_of
from sglang_hma.planner.kubernetes.server_pod import NAME_CARDS
from sglang_hma.planner.systems import COLOCATED

KUBERNETES = "1.34"  # the first whose claims are resource.k8s.io/v1
BASE = "deploy --format kubernetes --image registry/hma:1"
Documents = list[dict[str, Any]]


def printed(capsys: pytest.CaptureFixture[str], flags: str) -> Documents:
    main(f"{BASE} {flags}".split())
    return list(yaml.safe_load_all(capsys.readouterr().out))


def validate(documents: Documents) -> None:
    """By Kubernetes' own schemas; no field that they do not have."""
    for document in documents:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)


@cache
def server_parser() -> argparse.ArgumentParser:
    return arguments.full_parser()


def of_kind(documents: Documents, kind: str) -> dict[str, dict[str, Any]]:
    return {each["metadata"]["name"]: each for each in documents if each["kind"] == kind}


def pods(documents: Documents) -> dict[str, dict[str, Any]]:
    """Templates by the name of what makes them."""
    makers = {**of_kind(documents, "StatefulSet"), **of_kind(documents, "Deployment")}
    return {name: maker["spec"]["template"] for name, maker in makers.items()}


def flags_of(container: dict[str, Any]) -> list[str]:
    """Of the Python module that it starts."""
    command = container.get("args") or container["command"]
    assert command[:2] == ["python", "-m"]
    return list(command[3:])


def routes(container: dict[str, Any]) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    RouterArgs.add_cli_args(parser)
    return parser.parse_args(flags_of(container))


@dataclass
class Mix:
    """A mix to deploy, drawn, and what was printed for it."""

    system: str
    counts: dict[str, int]
    hbm: int
    gddr: int
    extra: list[str]
    documents: Documents = field(default_factory=list)

    @classmethod
    def drawn(cls, system: str, seed: int) -> "Mix":
        draw = Random(seed)
        counts = {"prefill": draw.randint(1, 5), "decode": draw.randint(1, 5)}
        every = ("--host-network", "--rdma-resource rdma/hca", "--namespace serving")
        extra = draw.sample(every, draw.randint(0, 3))
        return cls(system, counts, draw.choice((1, 2, 4, 8)), draw.choice((1, 2, 4)), extra)

    @property
    def flags(self) -> str:
        return (
            f"--model-path /models/m --model-volume pvc:models --system {self.system} --name mine "
            f"--prefill {self.counts['prefill']} --decode {self.counts['decode']} "
            f"--hbm-cards {self.hbm} --gddr-cards {self.gddr} {' '.join(self.extra)}"
        )

    @property
    def servers(self) -> dict[str, int]:
        """Replicas of each StatefulSet that there should be."""
        roles = ["decode"] if self.system in COLOCATED else ["prefill", "decode"]
        return {f"mine-{role}": self.counts[role] for role in roles}

    def on_cards(self, name: str) -> bool:
        return name == "mine-prefill" and self.system in ("ours", "hetero-serial")

    def kind(self, kind: str) -> dict[str, dict[str, Any]]:
        return of_kind(self.documents, kind)

    @property
    def pods(self) -> dict[str, dict[str, Any]]:
        return pods(self.documents)

    def container(self, name: str) -> dict[str, Any]:
        (found,) = self.pods[name]["spec"]["containers"]
        return dict(found)

    def arguments(self, name: str) -> argparse.Namespace:
        return server_parser().parse_args(flags_of(self.container(name)))

    def selected(self, selector: dict[str, Any]) -> set[str]:
        """Whose pods a selector means, as Kubernetes reads it."""
        return {name for name, pod in self.pods.items() if matches(selector, labels_of(pod))}


def matches(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    plain = selector.get("matchLabels", {}).items() <= labels.items()
    return plain and all(
        labels.get(each["key"]) in each["values"] for each in selector.get("matchExpressions", ())
    )


def labels_of(pod: dict[str, Any]) -> dict[str, str]:
    return dict(pod["metadata"]["labels"])


def named_ports(container: dict[str, Any]) -> dict[str, int]:
    return {port["name"]: port["containerPort"] for port in container["ports"]}


@pytest.fixture(params=DEPLOYABLE)
def mix(request: pytest.FixtureRequest, seed: int, capsys: pytest.CaptureFixture[str]) -> Mix:
    found = Mix.drawn(request.param, seed)
    found.documents = printed(capsys, found.flags)
    return found


def test_kubernetes_takes_it(mix: Mix) -> None:
    validate(mix.documents)


def test_there_is_what_was_asked_for(mix: Mix) -> None:
    sets = mix.kind("StatefulSet")
    assert {name: each["spec"]["replicas"] for name, each in sets.items()} == mix.servers
    namespaces = {each["metadata"].get("namespace") for each in mix.documents}
    assert namespaces == {"serving" if "--namespace serving" in mix.extra else None}


def test_selectors_mean_their_own_pods(mix: Mix) -> None:
    for name, maker in {**mix.kind("StatefulSet"), **mix.kind("Deployment")}.items():
        assert mix.selected(maker["spec"]["selector"]) == {name}
    for name, service in mix.kind("Service").items():
        assert mix.selected({"matchLabels": service["spec"]["selector"]}) == {name}
    for name in mix.servers:
        affinity = mix.pods[name]["spec"].get("affinity")
        assert (affinity is not None) == ("--host-network" in mix.extra)
        if affinity:
            (term,) = affinity["podAntiAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
            assert mix.selected(term["labelSelector"]) == set(mix.servers)


def test_ports_agree(mix: Mix) -> None:
    for name, service in mix.kind("Service").items():
        ports = named_ports(mix.container(name))
        for port in service["spec"]["ports"]:
            assert ports[port["targetPort"]] == port["port"]
    for name in mix.servers:
        container, args = mix.container(name), mix.arguments(name)
        ports = named_ports(container)
        assert args.port == ports["http"]
        assert args.host == "0.0.0.0"
        if name == "mine-prefill":
            assert args.disaggregation_bootstrap_port == ports["bootstrap"]
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            assert ports[container[probe]["httpGet"]["port"]] == args.port
        assert mix.pods[name]["metadata"]["annotations"]["prometheus.io/port"] == str(args.port)


def test_servers_are_of_their_role(mix: Mix) -> None:
    backends = set()
    for name in mix.servers:
        args, container = mix.arguments(name), mix.container(name)
        role = "null" if mix.system in COLOCATED else name.removeprefix("mine-")
        assert args.disaggregation_mode == role
        assert args.enable_metrics
        assert (args.hma_prefill_runtime == "ttnn") == mix.on_cards(name)
        (model,) = (each for each in container["volumeMounts"] if each["name"] == "models")
        assert Path(args.model_path).is_relative_to(model["mountPath"])
        backends.add(args.disaggregation_transfer_backend)
    if mix.system not in COLOCATED:
        rdma = "--rdma-resource rdma/hca" in mix.extra
        assert backends == {"mooncake" if rdma else "mooncake_tcp"}


def test_devices_are_those_that_the_server_uses(mix: Mix) -> None:
    for name in mix.servers:
        resources = mix.container(name)["resources"]
        limits = resources.get("limits", {})
        assert ("rdma/hca" in limits) == ("--rdma-resource rdma/hca" in mix.extra)
        if not mix.on_cards(name):
            assert limits["nvidia.com/gpu"] == str(mix.hbm) == str(mix.arguments(name).tp_size)
            continue
        assert "nvidia.com/gpu" not in limits
        (claim,) = mix.pods[name]["spec"]["resourceClaims"]
        assert resources["claims"] == [{"name": claim["name"]}]
        template = mix.kind("ResourceClaimTemplate")[claim["resourceClaimTemplateName"]]
        (request,) = template["spec"]["spec"]["devices"]["requests"]
        assert request["exactly"]["count"] == mix.gddr
        assert request["exactly"]["deviceClassName"] == "tenstorrent.com"


def test_the_router_has_every_server_by_its_name(mix: Mix) -> None:
    """The name that a StatefulSet's pod has through its headless Service."""
    container = mix.container("mine-router")
    router, ports = routes(container), named_ports(container)
    assert (router.port, router.prometheus_port) == (ports["http"], ports["metrics"])
    expected: dict[str, list[str]] = {}
    for name, count in mix.servers.items():
        service = mix.kind("StatefulSet")[name]["spec"]["serviceName"]
        assert mix.kind("Service")[service]["spec"]["clusterIP"] == "None"
        port = mix.arguments(name).port
        expected[name] = [f"http://{name}-{index}.{service}:{port}" for index in range(count)]
    assert router.pd_disaggregation == (mix.system not in COLOCATED)
    if mix.system in COLOCATED:
        assert router.worker_urls == expected["mine-decode"]
        return
    bootstrap = str(mix.arguments("mine-prefill").disaggregation_bootstrap_port)
    assert [tuple(each) for each in router.prefill] == [
        (url, bootstrap) for url in expected["mine-prefill"]
    ]
    assert [url for (url,) in router.decode] == expected["mine-decode"]


def test_only_servers_reach_the_ports_of_the_transfer(mix: Mix) -> None:
    policies = mix.kind("NetworkPolicy")
    assert len(policies) == (mix.system not in COLOCATED)
    for policy in policies.values():
        inside, outside = policy["spec"]["ingress"]
        (peer,) = inside["from"]
        for selector in (policy["spec"]["podSelector"], peer["podSelector"]):
            assert mix.selected(selector) == set(mix.servers)
        assert set(inside) == {"from"}
        assert [port["port"] for port in outside["ports"]] == [mix.arguments("mine-decode").port]


def test_two_chips_of_a_card_are_one_mesh(capsys: pytest.CaptureFixture[str]) -> None:
    documents = printed(capsys, "--model-path org/model --gddr n300 --gddr-cards 2")
    (container,) = pods(documents)["hma-prefill"]["spec"]["containers"]
    assert server_parser().parse_args(flags_of(container)).hma_mesh == 4
    (template,) = of_kind(documents, "ResourceClaimTemplate").values()
    (request,) = template["spec"]["spec"]["devices"]["requests"]
    (selector,) = request["exactly"]["selectors"]
    assert selector["cel"]["expression"].endswith('.boardName == "n300"')


def test_a_device_plugin_counts_cards(capsys: pytest.CaptureFixture[str]) -> None:
    documents = printed(
        capsys, "--model-path org/model --gddr-resource tenstorrent.com/p150 --gddr-cards 2"
    )
    validate(documents)
    assert not of_kind(documents, "ResourceClaimTemplate")
    (container,) = pods(documents)["hma-prefill"]["spec"]["containers"]
    assert container["resources"] == {"limits": {"tenstorrent.com/p150": "2"}}
    mounts = {each["mountPath"] for each in container["volumeMounts"]}
    assert "/dev/hugepages-1G" in mounts


def test_a_pod_names_the_cards_that_it_finds(tmp_path: Path, seed: int) -> None:
    """They keep the host's numbers."""
    numbers = sorted(Random(seed).sample(range(32), 4))
    for name in (*map(str, numbers), "by-id", "x1"):
        (tmp_path / name).touch()
    script = NAME_CARDS.replace("/dev/tenstorrent", shlex.quote(str(tmp_path)))
    assert script != NAME_CARDS
    ran = subprocess.run(
        ["sh", "-c", script, "sh", "printf", "%s\n", "two words"],
        capture_output=True,
        text=True,
        check=True,
    )
    first, flag, ids = ran.stdout.splitlines()
    assert (first, flag) == ("two words", "--hma-device-ids")
    assert sorted(map(int, ids.split(","))) == numbers


def test_the_models_folder_is_mounted_where_the_server_looks(
    capsys: pytest.CaptureFixture[str],
) -> None:
    documents = printed(capsys, "--model-path /a/b/m --model-volume hostPath:/srv/models")
    validate(documents)
    for name, pod in pods(documents).items():
        volumes = {each["name"]: each for each in pod["spec"].get("volumes", ())}
        assert ("models" in volumes) == (name != "hma-router")
        if "models" in volumes:
            assert volumes["models"]["hostPath"]["path"] == "/srv/models"
            (container,) = pod["spec"]["containers"]
            (mount,) = (each for each in container["volumeMounts"] if each["name"] == "models")
            assert mount["mountPath"] == "/a/b"
            assert volumes["shm"]["emptyDir"]["medium"] == "Memory"


def test_times_are_the_ones_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    documents = printed(capsys, "--model-path org/m --startup-minutes 45 --grace-seconds 77")
    for name, pod in pods(documents).items():
        (container,) = pod["spec"]["containers"]
        if name == "hma-router":
            assert routes(container).worker_startup_timeout_secs == 45 * 60
            assert pod["spec"]["terminationGracePeriodSeconds"] > (
                routes(container).shutdown_grace_period_secs
            )
        else:
            probe = container["startupProbe"]
            assert probe["periodSeconds"] * probe["failureThreshold"] == 45 * 60
            assert pod["spec"]["terminationGracePeriodSeconds"] == 77


@pytest.mark.parametrize(
    ("card", "board"), [("p150", "p150"), ("p100a", "p100"), ("n300", "n300"), ("p150b", "p150")]
)
def test_boards(card: str, board: str) -> None:
    assert board_of(card) == board


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--model-path /models/m", "--model-volume, hostPath:DIR or pvc:NAME"),
        ("--model-path org/m --model-volume pvc:a", "needs to be /a/path"),
        ("--model-path /m --model-volume pvc:a", "needs to be /a/path"),
        ("--model-path /a/m --model-volume nfs:a", "--model-volume is 'nfs:a': needs"),
        ("--model-path /a/m --model-volume hostPath:a", "needs hostPath:/a/folder or pvc:a-claim"),
        ("--model-path org/m --name My_Mix", "--name is 'My_Mix'"),
        ("--model-path org/m --namespace=-x", "--namespace is '-x'"),
        ("--model-path org/m --gddr-resource cards", "--gddr-resource is 'cards'"),
        ("--model-path org/m --shared-memory lots", "--shared-memory is 'lots'"),
        ("--model-path org/m --transfer rdma", "without --rdma-resource"),
        ("--model-path org/m --startup-minutes 0", "--startup-minutes is 0; needs 1 or more"),
    ],
)
def test_bad_input_is_one_line(flags: str, said: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main(f"{BASE} {flags}".split())
    message = str(ended.value)
    assert said in message
    assert re.fullmatch(r"sglang_hma\.planner: error: [^\n]+", message)


def test_an_image_is_needed() -> None:
    with pytest.raises(SystemExit) as ended:
        main(["deploy", "--format", "kubernetes", "--model-path", "org/m"])
    assert "give --image" in str(ended.value)
