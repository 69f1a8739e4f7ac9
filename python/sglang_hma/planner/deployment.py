"""The commands that start a mix: of its servers, of its router, and of all on one box."""

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from sglang_hma.config import MESHES, PAGE_TOKENS
from sglang_hma.launch.defaults import LIVE_ROUTER_DEFAULTS, ROUTER_DEFAULTS
from sglang_hma.planner.model_shape import ModelShape
from sglang_hma.planner.problem import Problem
from sglang_hma.planner.systems import COLOCATED, Site, System
from sglang_hma.tensor_parallel import refuse_sizes

Role = Literal["prefill", "decode"]
Transfer = Literal["tcp", "rdma"]
HostOf = Callable[[Role, int], str]

PORT, BOOTSTRAP, ROUTER_PORT = 30001, 8998, 30000
SECRET_FILE = "/etc/sglang-hma/secret"  # on every host and in every pod of a pair's servers
SERVER = ("python", "-m", "sglang_hma.launch_server")
STOCK_SERVER = ("python", "-m", "sglang.launch_server")
BACKENDS: dict[Transfer, str] = {"tcp": "mooncake_tcp", "rdma": "mooncake"}
# The others are there to be compared with: nothing here serves them.
DEPLOYABLE: tuple[System, ...] = ("ours", "hetero-serial", "pd-bf16", "pd-fp8", *COLOCATED)


class CannotStart(Problem):
    """One line: what about a mix no command starts, and the remedy."""


@dataclass(frozen=True)
class Plan:
    """A mix to start.

    prefill, decode: instances; co-located ones are counted as decode. model: where hosts have it.
    chips: of one GDDR card. transfer: None for what a prefill server takes by itself.
    """

    site: Site
    system: System
    prefill: int
    decode: int
    model: str
    chips: int = 1
    transfer: Transfer | None = None

    @property
    def roles(self) -> dict[Role, int]:
        """How many servers of each there are."""
        counts: dict[Role, int] = {"prefill": self.prefill, "decode": self.decode}
        return {role: count for role, count in counts.items() if count}

    @property
    def on_gddr(self) -> bool:
        """Whether prefill computes on GDDR cards."""
        return self.system in ("ours", "hetero-serial")

    @property
    def backend(self) -> str:
        return BACKENDS[self.transfer or ("tcp" if self.on_gddr else "rdma")]


def check(plan: Plan, shape: ModelShape) -> None:
    """Raises CannotStart for what the servers would refuse."""
    site = plan.site
    if not plan.on_gddr:
        return
    if plan.chips * site.gddr_cards not in MESHES.values():
        raise CannotStart(
            f"--gddr-cards is {site.gddr_cards}, of {site.gddr} with {plan.chips} chip(s) each: "
            f"an instance is a mesh of {', '.join(map(str, MESHES.values()))} chips"
        )
    why = refuse_sizes(1, site.hbm_cards, page_format="bfp8", kv_heads=shape.kv_heads)
    if why:
        raise CannotStart(f"--hbm-cards is {site.hbm_cards}: {why}; take another number")
    if site.chunk_tokens % PAGE_TOKENS:
        raise CannotStart(
            f"--chunk-tokens is {site.chunk_tokens}: needs a multiple of {PAGE_TOKENS}, a page"
        )


def server(
    plan: Plan, role: Role, *, host: str = "0.0.0.0", peers: HostOf | None, card_ids: bool = True
) -> list[str]:
    """The command of one server of a role, alone on its host.

    host: the address to listen on. peers: names of the prefill servers that decode takes pages
    from; None for any. card_ids: name the GDDR cards.
    """
    if plan.system in COLOCATED:
        command = [*STOCK_SERVER, "--model-path", plan.model, "--host", host, "--port", str(PORT)]
    else:
        command = of_pair(plan.model, role, host)
    if role == "decode" and plan.prefill and peers:
        allowed = [f"{peers('prefill', index)}:{BOOTSTRAP}" for index in range(plan.prefill)]
        command += ["--hma-prefill-peers", *allowed]
    return [*command, *_shared(plan), *_own(plan, role, plan.site.gddr_cards * card_ids)]


def of_pair(model: str, role: Role, host: str) -> list[str]:
    """How the command of a prefill or decode server begins."""
    command = [*SERVER, "--model-path", model, "--disaggregation-mode", role]
    command += ["--host", host, "--port", str(PORT)]
    if role == "prefill":
        command += ["--disaggregation-bootstrap-port", str(BOOTSTRAP)]
    return [*command, "--hma-cluster-secret-file", SECRET_FILE]


def router(plan: Plan, *flags: str) -> list[str]:
    """Its command; `flags` say where the servers are."""
    module = "sglang_hma.launch.router" if plan.prefill else "sglang_router.launch_router"
    command = ["python", "-m", module]
    if plan.prefill:
        command += ["--pd-disaggregation", "--policy", "power_of_two", *LIVE_ROUTER_DEFAULTS]
    else:
        command += ROUTER_DEFAULTS
    return [*command, "--host", "0.0.0.0", "--port", str(ROUTER_PORT), *flags]


def named_servers(plan: Plan, host: HostOf) -> list[str]:
    """The router's flags for servers that listen on `host`(role, index)."""
    urls = {
        role: [f"http://{host(role, index)}:{PORT}" for index in range(count)]
        for role, count in plan.roles.items()
    }
    if not plan.prefill:
        return ["--worker-urls", *urls["decode"]]
    flags = []
    for url in urls["prefill"]:
        flags += ["--prefill", url, str(BOOTSTRAP)]
    for url in urls["decode"]:
        flags += ["--decode", url]
    return flags


def lines(plan: Plan) -> list[str]:
    """For hosts named prefill-N and decode-N, one instance each, and a router on decode-0."""

    def host(role: Role, index: int) -> str:
        return f"{role}-{index}"

    found = [
        f"{host(role, index)} $ {shlex.join(server(plan, role, peers=host))}"
        for role, count in plan.roles.items()
        for index in range(count)
    ]
    return [*found, f"{host('decode', 0)} $ {shlex.join(router(plan, *named_servers(plan, host)))}"]


def launch_pd(plan: Plan) -> str:
    """The line that starts all of it on one box. Raises CannotStart."""
    if plan.system in COLOCATED:
        raise CannotStart("launch_pd starts prefill and decode servers, not colocated ones")
    if plan.decode > 1:
        raise CannotStart(
            f"{plan.decode} decode instances: launch_pd gives each the same GPUs; take one, or "
            "--format lines"
        )
    if plan.prefill > 1 and not plan.on_gddr:
        raise CannotStart(
            f"{plan.prefill} prefill instances of {plan.system}: launch_pd gives each the same "
            "GPUs; take one, or --format lines"
        )
    own = {role: _own(plan, role, plan.site.gddr_cards * plan.prefill) for role in plan.roles}
    if not plan.on_gddr:
        own["decode"] += ["--base-gpu-id", str(plan.site.hbm_cards)]
    command = ["python", "-m", "sglang_hma.launch_pd", "--model-path", plan.model]
    command += ["--prefill", str(plan.prefill), "--decode", str(plan.decode)]
    command += ["--host", "0.0.0.0", "--port", str(ROUTER_PORT), *_shared(plan)]
    for role, flags in own.items():
        if flags:
            command += [f"--{role}-args", shlex.join(flags)]
    return shlex.join([*command, "--router-args", "--policy power_of_two"])


def _shared(plan: Plan) -> list[str]:
    """What prefill and decode must agree on, and the metrics that `advise` reads."""
    flags = ["--enable-metrics"]
    if not plan.prefill:
        return flags
    flags += ["--disaggregation-transfer-backend", plan.backend]
    if not plan.on_gddr:
        flags += ["--hma-kv-format", "native"]
    if plan.system == "pd-fp8":
        flags += ["--kv-cache-dtype", "fp8_e4m3"]
    return flags


def _own(plan: Plan, role: Role, cards: int) -> list[str]:
    """Of one role; `cards`: how many GDDR cards to name, for all of its servers on the host."""
    site = plan.site
    flags = []
    if role == "prefill" or not plan.prefill:
        flags += ["--chunked-prefill-size", str(site.chunk_tokens)]
    if plan.system == "colocated-mixed":
        flags.append("--enable-mixed-chunk")
    if role == "prefill" and plan.on_gddr:
        flags += ["--hma-prefill-runtime", "ttnn"]
        if plan.chips > 1:
            flags += ["--hma-mesh", f"1x{site.gddr_cards * plan.chips}"]
        if plan.system == "hetero-serial":
            flags += ["--hma-layers-per-send", "all"]
        if cards:
            flags += ["--hma-device-ids", ",".join(map(str, range(cards)))]
    elif site.hbm_cards > 1:
        flags += ["--tp-size", str(site.hbm_cards)]
    return flags
