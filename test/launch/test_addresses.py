"""The address that a server's ports are bound to, out of its flags and its environment."""

import pytest

from sglang_hma.launch.addresses import HOST_IPS, one_address
from sglang_hma.launch.flags import Refusal

from .reading import CPU, DECODE, start


@pytest.fixture(autouse=True)
def told_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in HOST_IPS:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("argv", "address", "host"),
    [
        ([], "127.0.0.1", "127.0.0.1"),
        (["--host", "127.0.0.2"], "127.0.0.2", "127.0.0.2"),
        (["--host=::1"], "::1", "::1"),
        (["--host", "localhost"], "127.0.0.1", "localhost"),
        (["--host", "0.0.0.0"], None, "0.0.0.0"),
        (["--host", "::"], None, "::"),
        (["--host", "no.such.host.invalid"], None, "no.such.host.invalid"),
        (["--hma-bind", "127.0.0.2"], "127.0.0.2", "127.0.0.2"),
        (["--hma-bind", "127.0.0.2", "--host", "0.0.0.0"], "127.0.0.2", "0.0.0.0"),
    ],
)
def test_all_ports_are_at_one_address(argv: list[str], address: str | None, host: str) -> None:
    config, server_args = start(*CPU, *DECODE, *argv)
    assert (config.bind, server_args.host) == (address, host)


def test_an_address_that_the_user_told_sglang(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOST_IP", "10.1.2.3")
    assert start(*CPU, *DECODE)[0].bind == "10.1.2.3"
    monkeypatch.setenv("SGLANG_HOST_IP", "10.1.2.4")
    assert start(*CPU, *DECODE)[0].bind == "10.1.2.4"
    assert start(*CPU, *DECODE, "--hma-bind", "127.0.0.1")[0].bind == "127.0.0.1"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--hma-bind", "203.0.113.7"], ["--hma-bind is 203.0.113.7", "an address of this host"]),
        (["--hma-bind", "0.0.0.0"], ["--hma-bind", "'0.0.0.0' is every address"]),
        (["--hma-bind", "eth0"], ["--hma-bind", "'eth0' is no IP address"]),
        (["--hma-drain-timeout", "soon"], ["--hma-drain-timeout", "'soon'"]),
        (["--hma-hang-timeout", "-1"], ["--hma-hang-timeout", "'-1'"]),
        (["--hma-hang-timeout", "0"], ["--hma-hang-timeout", "'0'", "1 or more"]),
        (["--hma-hang-timeout", "inf"], ["--hma-hang-timeout", "'inf'"]),
    ],
)
def test_what_is_refused(argv: list[str], words: list[str]) -> None:
    with pytest.raises(Refusal) as refused:
        start(*CPU, *DECODE, *argv)
    assert all(word in str(refused.value) for word in words)


def test_version_four_comes_first() -> None:
    assert one_address("localhost") == "127.0.0.1"
