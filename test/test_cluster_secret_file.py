"""The file with the secret: what is refused, and what is made of it."""

import os
import stat
from pathlib import Path

import pytest

from sglang_hma import cluster_secret
from sglang_hma.cluster_secret import MAX_BYTES, MIN_BYTES, ClusterKeys
from sglang_hma.launch.arguments import assume
from sglang_hma.launch.flags import Refusal

SERVER = ["--model-path", "m", "--device", "cpu", "--host", "127.0.0.1"]


def write(path: Path, secret: bytes, mode: int = 0o600) -> str:
    path.write_bytes(secret)
    path.chmod(mode)
    return str(path)


def test_the_secret_without_white_space(tmp_path: Path) -> None:
    text = os.urandom(20).hex().encode()
    assert cluster_secret.read(write(tmp_path / "s", b"\n" + text + b" \n")) == text


@pytest.mark.parametrize(
    ("secret", "mode", "words"),
    [
        (b"", 0o600, f"0 bytes, and needs {MIN_BYTES}"),
        (b"short\n", 0o600, "5 bytes"),
        (b" " * 100, 0o600, "0 bytes"),
        (b"x" * (MAX_BYTES + 1), 0o600, "longer than"),
        (b"x" * 64, 0o644, "chmod 600"),
        (b"x" * 64, 0o602, "chmod 600"),
    ],
)
def test_what_is_no_secret(tmp_path: Path, secret: bytes, mode: int, words: str) -> None:
    path = write(tmp_path / "s", secret, mode)
    with pytest.raises(ValueError, match=words):
        cluster_secret.read(path)
    flags = ["--disaggregation-mode", "decode", "--hma-cluster-secret-file", path]
    with pytest.raises(Refusal, match=f"--hma-cluster-secret-file is {path}: .*{words}"):
        assume([*SERVER, *flags])


def test_a_missing_file_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"No such file.*openssl rand -hex 32 > "):
        cluster_secret.read(str(tmp_path / "none"))


def test_a_group_may_read_it(tmp_path: Path) -> None:
    """As a Kubernetes Secret with fsGroup is mounted."""
    cluster_secret.read(write(tmp_path / "s", b"x" * 64, 0o440))


def test_a_new_one(tmp_path: Path) -> None:
    path = tmp_path / "s"
    cluster_secret.make(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert len(cluster_secret.read(str(path))) == 2 * MIN_BYTES
    with pytest.raises(FileExistsError):
        cluster_secret.make(path)


def test_every_key_is_another(tmp_path: Path) -> None:
    found = {
        key
        for secret in (b"a" * 32, b"b" * 32)
        for keys in [ClusterKeys(secret)]
        for key in (
            keys.bootstrap,
            *(keys.listening("prefill"), keys.listening("decode")),
            *(keys.calling("prefill"), keys.calling("decode")),
        )
    }
    assert len(found) == 10 and {len(key) for key in found} == {32}


def test_a_relative_path_is_the_same_in_every_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "s", b"x" * 64)
    monkeypatch.chdir(tmp_path)
    flags = ["--hma-cluster-secret-file", "s"]
    for role, expected in (("prefill", str(tmp_path / "s")), ("decode", str(tmp_path / "s"))):
        config = assume([*SERVER, "--disaggregation-mode", role, *flags])
        assert config.cluster_secret_file == expected
    assert assume([*SERVER, *flags]).cluster_secret_file is None, "it has no peer"
