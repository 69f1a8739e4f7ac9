"""The manifests that `deploy` prints: Kubernetes' own schemas, SGLang's parsers, and each other."""

import re
import shlex
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import pytest
import yaml

from sglang_hma.planner.__main__ import main
from sglang_hma.planner.deployment import DEPLOYABLE
from sglang_hma.planner.kubernetes.cluster import board_of
from sglang_hma.planner.kubernetes.server_pod import NAME_CARDS
from sglang_hma.planner.systems import COLOCATED

from ..deployment.checks import check, check_discovery
from ..deployment.documents import Deployed, routes

BASE = "deploy --format kubernetes --image registry/hma:1"


def printed(capsys: pytest.CaptureFixture[str], flags: str) -> Deployed:
    main(f"{BASE} {flags}".split())
    return Deployed(list(yaml.safe_load_all(capsys.readouterr().out)))


@dataclass
class Mix(Deployed):
    """A mix to deploy, drawn, and what was printed for it."""

    system: str = "ours"
    counts: dict[str, int] = field(default_factory=dict)
    hbm: int = 1
    gddr: int = 1
    extra: list[str] = field(default_factory=list)

    @classmethod
    def drawn(cls, system: str, seed: int) -> "Mix":
        draw = Random(seed)
        counts = {"prefill": draw.randint(1, 5), "decode": draw.randint(1, 5)}
        every = ("--host-network", "--rdma-resource rdma/hca", "--namespace serving")
        extra = draw.sample(every, draw.randint(0, 3))
        return cls([], system, counts, draw.choice((1, 2, 4, 8)), draw.choice((1, 2, 4)), extra)

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


@pytest.fixture(params=DEPLOYABLE)
def mix(request: pytest.FixtureRequest, seed: int, capsys: pytest.CaptureFixture[str]) -> Mix:
    found = Mix.drawn(request.param, seed)
    found.documents = printed(capsys, found.flags).documents
    return found


def test_what_holds_of_all_manifests(mix: Mix) -> None:
    check(mix, stock=mix.system in COLOCATED)


@pytest.mark.parametrize("system", ["ours", "pd-fp8"])
def test_the_router_finds_servers(system: str, capsys: pytest.CaptureFixture[str]) -> None:
    deployed = printed(
        capsys, f"--model-path org/m --system {system} --service-discovery --namespace serving"
    )
    check(deployed)
    check_discovery(deployed)


def test_colocated_servers_are_found_too(capsys: pytest.CaptureFixture[str]) -> None:
    deployed = printed(capsys, "--model-path org/m --system colocated --service-discovery")
    check(deployed, stock=True)
    router = routes(deployed.container("hma-router"))
    assert router.service_discovery and not router.worker_urls
    assert deployed.selected({"matchLabels": router.selector}) == {"hma-decode"}


def test_there_is_what_was_asked_for(mix: Mix) -> None:
    sets = mix.kind("StatefulSet")
    assert {name: each["spec"]["replicas"] for name, each in sets.items()} == mix.servers
    namespaces = {each["metadata"].get("namespace") for each in mix.documents}
    assert namespaces == {"serving" if "--namespace serving" in mix.extra else None}


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
    router = routes(mix.container("mine-router"))
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
    assert router.prefill_urls == [(url, int(bootstrap)) for url in expected["mine-prefill"]]
    assert router.decode_urls == expected["mine-decode"]
    peers = [
        f"{url.removeprefix('http://').rpartition(':')[0]}:{bootstrap}"
        for url in expected["mine-prefill"]
    ]
    assert mix.arguments("mine-decode").hma_prefill_peers == peers


def test_two_chips_of_a_card_are_one_mesh(capsys: pytest.CaptureFixture[str]) -> None:
    deployed = printed(capsys, "--model-path org/model --gddr n300 --gddr-cards 2")
    assert deployed.arguments("hma-prefill").hma_mesh == 4
    (template,) = deployed.kind("ResourceClaimTemplate").values()
    (request,) = template["spec"]["spec"]["devices"]["requests"]
    (selector,) = request["exactly"]["selectors"]
    assert selector["cel"]["expression"].endswith('.boardName == "n300"')


def test_a_device_plugin_counts_cards(capsys: pytest.CaptureFixture[str]) -> None:
    deployed = printed(
        capsys, "--model-path org/model --gddr-resource tenstorrent.com/p150 --gddr-cards 2"
    )
    check(deployed)
    assert not deployed.kind("ResourceClaimTemplate")
    container = deployed.container("hma-prefill")
    assert container["resources"]["limits"] == {"tenstorrent.com/p150": "2"}
    assert "claims" not in container["resources"]
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
    deployed = printed(capsys, "--model-path /a/b/m --model-volume hostPath:/srv/models")
    check(deployed)
    for name, pod in deployed.pods.items():
        volumes = {each["name"]: each for each in pod["spec"].get("volumes", ())}
        assert ("models" in volumes) == (name != "hma-router")
        if "models" in volumes:
            assert volumes["models"]["hostPath"]["path"] == "/srv/models"
            (container,) = pod["spec"]["containers"]
            (mount,) = (each for each in container["volumeMounts"] if each["name"] == "models")
            assert mount["mountPath"] == "/a/b"
            assert volumes["shm"]["emptyDir"]["medium"] == "Memory"


def test_times_are_the_ones_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    deployed = printed(capsys, "--model-path org/m --startup-minutes 45 --grace-seconds 77")
    check(deployed)
    for name, pod in deployed.pods.items():
        (container,) = pod["spec"]["containers"]
        if name == "hma-router":
            assert routes(container).worker_startup_timeout_secs == 45 * 60
        else:
            probe = container["startupProbe"]
            assert probe["periodSeconds"] * probe["failureThreshold"] == 45 * 60
            assert pod["spec"]["terminationGracePeriodSeconds"] == 77
            assert deployed.arguments(name).hma_drain_timeout == 47


def test_what_servers_ask_for(capsys: pytest.CaptureFixture[str]) -> None:
    deployed = printed(
        capsys,
        "--model-path org/m --server-cpus 500m --server-memory 3Gi --cluster-secret ours "
        "--metrics-namespace eyes --prefill-image registry/cards:2",
    )
    check(deployed)
    for name in deployed.sets:
        assert deployed.container(name)["resources"]["requests"] == {"cpu": "500m", "memory": "3Gi"}
        volumes = {each["name"]: each for each in deployed.pods[name]["spec"]["volumes"]}
        assert volumes["cluster-secret"]["secret"]["secretName"] == "ours"
    images = {name: deployed.container(name)["image"] for name in deployed.pods}
    others = dict.fromkeys(("hma-decode", "hma-router"), "registry/hma:1")
    assert images == {"hma-prefill": "registry/cards:2", **others}
    for policy in deployed.kind("NetworkPolicy").values():
        _, readers = policy["spec"]["ingress"][0]["from"]
        assert list(readers["namespaceSelector"]["matchLabels"].values()) == ["eyes"]


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
        ("--model-path org/m --grace-seconds 30", "--grace-seconds is 30; needs 31 or more"),
        ("--model-path org/m --server-cpus many", "--server-cpus is 'many'"),
        ("--model-path org/m --server-memory 1x", "--server-memory is '1x'"),
        ("--model-path org/m --cluster-secret A_b", "--cluster-secret is 'A_b'"),
        ("--model-path org/m --metrics-namespace A", "--metrics-namespace is 'A'"),
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
