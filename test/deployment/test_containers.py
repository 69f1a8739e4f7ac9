"""deploy/containers: hadolint, and what the files name. No image is built here."""

import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from scripts import kubernetes_files
from sglang_hma import __version__
from sglang_hma.planner.kubernetes.server_pod import USER

from .documents import Deployed

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "deploy" / "containers").glob("*.Dockerfile"))


def instructions(file: Path) -> list[tuple[str, str]]:
    """(INSTRUCTION, the rest), one a line."""
    text = re.sub(r"^#.*\n", "", file.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in text.splitlines() if line]


def copied(file: Path) -> list[str]:
    """What of the repository goes into it."""
    lines = [rest for word, rest in instructions(file) if word == "COPY"]
    return [source for rest in lines for source in rest.split()[:-1]]


by_file = pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
ON_THEIR_OWN = [file for file in FILES if copied(file)]


@by_file
def test_hadolint(file: Path) -> None:
    hadolint = Path(sys.executable).parent / "hadolint"
    done = subprocess.run([hadolint, "--no-color", file], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@by_file
def test_it_is_named_as_the_manifests_name_it(file: Path) -> None:
    image = f"sglang-hma-{file.stem}:{__version__}"
    assert f"-f deploy/containers/{file.name} -t {image} ." in file.read_text()
    images = {
        container["image"]
        for overlay in kubernetes_files.overlays().values()
        for deployed in [Deployed(overlay.manifests())]
        for container in map(deployed.container, deployed.pods)
    }
    assert image in images and len(images) == len(FILES)


@by_file
def test_its_user_is_the_pods(file: Path) -> None:
    *_, last = (rest for word, rest in instructions(file) if word == "USER")
    assert last == str(USER)


@pytest.mark.parametrize("file", ON_THEIR_OWN, ids=lambda file: file.stem)
def test_requirements_are_the_closed_lists(file: Path) -> None:
    lists = set(re.findall(r"-r (\S+)", file.read_text()))
    assert lists == {f"requirements/{file.stem}.txt", "requirements/build.txt"}
    assert "--no-deps" in file.read_text() and all((ROOT / name).is_file() for name in lists)


@pytest.mark.parametrize("file", ON_THEIR_OWN, ids=lambda file: file.stem)
def test_what_is_copied_is_sent_and_makes_the_package(file: Path, tmp_path: Path) -> None:
    sent = (ROOT / ".dockerignore").read_text().splitlines()
    assert sent[0] == "*"
    assert {line.removeprefix("!") for line in sent if line.startswith("!")} == set(copied(file))
    for name in copied(file):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tmp_path / name, ignore=shutil.ignore_patterns("*.so"))
        else:
            shutil.copy(source, tmp_path / name)
    command = [sys.executable, "-m", "uv", "build", "--offline", "--wheel", "--no-build-isolation"]
    command += ["--python", sys.executable, "--config-setting=wheel.cmake=false", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    assert wheel.name.startswith(f"sglang_hma-{__version__}-")


@pytest.mark.skipif(find_spec("ttnn") is None, reason="ttnn has no wheel for this Python")
def test_the_vendors_compiler_is_of_ttnns_release() -> None:
    spec = find_spec("ttnn")
    assert spec is not None and spec.origin is not None
    lines = (Path(spec.origin).parent / "tt_metal" / "sfpi-version").read_text().splitlines()
    facts = {name: value.strip("'") for name, _, value in (line.partition("=") for line in lines)}
    text = (ROOT / "deploy" / "containers" / "tenstorrent.Dockerfile").read_text()
    given = dict(re.findall(r"^ARG (\w+)=(\S+)", text, re.MULTILINE))
    assert given["SFPI"] == facts["sfpi_version"]
    assert given["SFPI_SHA256"] == facts["sfpi_x86_64_debian_deb_hash"]
    assert given["BASE"] == f"sglang-hma-cpu:{__version__}"
