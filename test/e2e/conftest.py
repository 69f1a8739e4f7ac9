"""Servers shared by the end-to-end tests. All run on CPU, fp32, with a random tiny model."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from .harness import Pair, Process, Server, launch, launch_router, running

CHUNK = 64
COMMON = ("--dtype", "float32", "--chunked-prefill-size", str(CHUNK), "--enable-metrics")
# Small enough that 200 concurrent requests reuse pages and retract.
POOL_TOKENS = 4096
PREFILL_TOKENS = 2048
FAULTY_LINK = Path(__file__).parent.parent / "stand_ins" / "faulty_link"
SHOWN_LINES = 40
ended_by_themselves: dict[str, str] = {}  # processes, and what they ended with


@pytest.fixture(scope="session")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("logs")


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from sglang_hma.demo.random_model import make_random_model

    path = tmp_path_factory.mktemp("models") / "qwen3"
    make_random_model(path)
    return path


@dataclass
class Faults:
    """What the pair's transfer engine does wrong, from now on: see stand_ins/faulty_link."""

    file: Path

    def set(self, **faults: float) -> None:
        self.held.unlink(missing_ok=True)
        written = self.file.with_suffix(".new")
        written.write_text(json.dumps(faults))
        written.replace(self.file)

    @property
    def held(self) -> Path:
        """Exists once a write is kept from being done by `hold_after`."""
        return self.file.with_name(f"{self.file.name}.held")

    def hold_a_peer(self) -> bool:
        """Whether `hold_peers` would hold one."""
        return self.held.exists() and self.held.read_text() != ""


@pytest.fixture(scope="session")
def faults(logs: Path) -> Faults:
    made = Faults(logs / "faults.json")
    made.set()
    return made


@pytest.fixture(scope="session")
def launched(
    request: pytest.FixtureRequest, model: Path, logs: Path, faults: Faults
) -> Iterator[dict[str, Server]]:
    """The servers that several modules use, started at once; `pair` and `single` wait for them.

    Prefill's pool is small, so that freed pages are handed out again at once. So are the others':
    requests compete for pages.
    """
    pools = {
        "prefill": ("--max-total-tokens", str(PREFILL_TOKENS)),
        "decode": (
            *("--max-total-tokens", str(POOL_TOKENS), "--max-running-requests", "64"),
            *("--num-reserved-decode-tokens", "1"),
        ),
        "single": ("--max-total-tokens", "3072"),
    }
    env = {"PYTHONPATH": str(FAULTY_LINK), "HMA_TEST_FAULTS": str(faults.file)}
    used = {name for item in request.session.items for name in getattr(item, "fixturenames", ())}
    servers = {}
    try:
        for mode in ("prefill", "decode") if "pair" in used else ():
            flags = (*COMMON, *pools[mode])
            servers[mode] = launch(f"pd-{mode}", model, logs, *flags, mode=mode, env=env)
        if "single" in used:
            servers["single"] = launch("single", model, logs, *COMMON, *pools["single"])
        yield servers
    finally:
        for server in servers.values():
            server.stop()


@pytest.fixture(scope="session")
def pair(launched: dict[str, Server], logs: Path) -> Iterator[Pair]:
    """Prefill, decode and router with BFP8 pages."""
    prefill, decode = (launched[mode].wait_healthy() for mode in ("prefill", "decode"))
    router = launch_router(logs, prefill, decode, "pd-router")
    with running(router):
        yield Pair(prefill, decode, router)


@pytest.fixture(scope="session")
def single(launched: dict[str, Server]) -> Server:
    """One server with the same formats, both roles."""
    return launched["single"].wait_healthy()


def pytest_runtest_setup() -> None:
    Process.started[:] = [process for process in Process.started if process.alive()]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """A failure shows the last lines of every process that ran during the test."""
    report = yield
    if report.failed and report.when in ("setup", "call"):
        for process in Process.started:
            lines = [line for line in process.text().splitlines() if '"GET /' not in line]
            report.sections.append((f"log of {process.name}", "\n".join(lines[-SHOWN_LINES:])))
            if not process.alive():
                ended_by_themselves.setdefault(process.name, process.last_words())
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """At the end, where who sees no more than that finds it."""
    for name, words in ended_by_themselves.items():
        terminalreporter.section(f"{name} ended by itself")
        terminalreporter.write_line(words)
