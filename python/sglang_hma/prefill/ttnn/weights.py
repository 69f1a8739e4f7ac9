"""From Hugging Face tensors to tensors on the card, one at a time, with a cache on disk.

A linear weight goes to the card as W.T, packed to BFP8 by the vendor's host packer (the same bytes
as prefill/weights.py rounds through); embedding, norms and biases stay BF16. On a mesh each chip
has its heads of attention, its columns of the MLP and its part of the vocabulary in the LM head; a
packed group of 16 values is never divided. Each finished tensor is kept on disk in ttnn's own
format, so that the next start reads no checkpoint.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from sglang_hma.config import WeightFormats
from sglang_hma.prefill.ttnn.card import Card, cache_folder
from sglang_hma.prefill.ttnn.checkpoint import (
    EMBEDDING,
    HEAD,
    refuse_head,
    refuse_missing,
    refuse_tensor,
)
from sglang_hma.prefill.ttnn.pieces import Piece, pieces
from sglang_hma.prefill.ttnn.shape import ModelShape

KEEP_MODELS = 4
# Raised whenever the same checkpoint and formats make other tensors.
LAYOUT = 3


class WeightCache:
    """A folder of finished tensors for one checkpoint, its formats, a mesh and a ttnn version.

    A tensor is written under another name and renamed, so a file that is there is whole. It is read
    only once the whole checkpoint has been looked at, whose last tensor may be one to refuse.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def for_model(cls, model: Path, formats: WeightFormats, chips: int) -> "WeightCache":
        base = cache_folder() / "weights"
        said = f"{fingerprint(model)} {_ttnn_version()} {LAYOUT} {formats} {chips}"
        cache = cls(base / hashlib.sha256(said.encode()).hexdigest()[:24])
        cache.folder.mkdir(parents=True, exist_ok=True)
        os.utime(cache.folder)
        _forget_old(base)
        return cache

    def path(self, piece: Piece) -> Path:
        return self.folder / f"{piece.name}.tensorbin"

    def holds_all(self, plan: Iterable[Piece]) -> bool:
        return self._mark.is_file() and all(self.path(piece).is_file() for piece in plan)

    def finish(self) -> None:
        """Everything is there, and the checkpoint has nothing else."""
        self._mark.touch()

    @property
    def _mark(self) -> Path:
        return self.folder / "whole"

    def store(self, piece: Piece, tensor: Any) -> None:
        import ttnn

        unfinished = self.folder / f"{piece.name}.{os.getpid()}.tensorbin"
        try:
            ttnn.dump_tensor(str(unfinished), tensor)
            unfinished.replace(self.path(piece))
        finally:
            unfinished.unlink(missing_ok=True)


def checkpoint_folder(model: str, revision: str | None, download: str | None) -> Path | None:
    """Where a checkpoint lies: `model` itself, or what was fetched from the hub under that name."""
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        folder = snapshot_download(
            model, revision=revision, cache_dir=download, local_files_only=True
        )
    except (LocalEntryNotFoundError, HFValidationError):
        return None
    return Path(folder)


def fingerprint(model: Path) -> str:
    """Changes when the checkpoint does: names, sizes, times and headers of its files."""
    files = sorted(model.glob("*.safetensors")) + sorted(model.glob("config.json"))
    digest = hashlib.sha256()
    for file in files:
        stat = file.stat()
        with file.open("rb") as opened:
            start = opened.read(min(stat.st_size, 1 << 20))
        digest.update(json.dumps([file.name, stat.st_size, stat.st_mtime_ns]).encode() + start)
    return digest.hexdigest()


def _ttnn_version() -> str:
    try:
        return version("ttnn")
    except PackageNotFoundError:
        return "built from source"


def _forget_old(base: Path) -> None:
    """The models used last stay."""
    folders = sorted(base.iterdir(), key=lambda folder: folder.stat().st_mtime, reverse=True)
    for folder in folders[KEEP_MODELS:]:
        shutil.rmtree(folder, ignore_errors=True)


class Weights:
    """Tensors on the card by piece name."""

    def __init__(
        self, shape: ModelShape, card: Card, cache: WeightCache | None, formats: WeightFormats
    ) -> None:
        self.shape, self.device, self.cache, self.formats = shape, card.device, cache, formats
        self.chips = card.chips
        self.plan = list(pieces(shape, card.chips))
        self.tensors: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        return self.tensors[name]

    def get(self, name: str) -> Any:
        """None if the model has no such piece."""
        return self.tensors.get(name)

    def load_cached(self) -> bool:
        """Read everything from the cache, or nothing if something is missing there."""
        import ttnn

        if self.cache is None or not self.cache.holds_all(self.plan):
            return False
        for piece in _progress(self.plan, "Weights to the card"):
            path = str(self.cache.path(piece))
            self.tensors[piece.name] = ttnn.load_tensor(path, device=self.device)
        return True

    def load(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """From (name, tensor) pairs in any order; keeps those whose piece is not complete yet.

        Raises OddCheckpoint, a ValueError, if one is missing, of another shape or dtype, or of no
        use.
        """
        users: dict[str, list[Piece]] = {}
        for piece in self.plan:
            for source in piece.sources:
                users.setdefault(source, []).append(piece)
        for piece in self.plan:
            if not piece.sources:
                self._place(piece, [])
        waiting: dict[str, torch.Tensor] = {}
        heads: dict[str, torch.Tensor] = {}
        seen = set()
        for name, tensor in _progress(tensors, "Weights packed", total=len(users)):
            refuse_tensor(self.shape, name, tensor.shape, tensor.dtype)
            seen.add(name)
            if self.shape.tied and name in (EMBEDDING, HEAD):
                heads[name] = tensor
                if len(heads) == 2:
                    refuse_head(heads.pop(EMBEDDING), heads.pop(HEAD))
            if name not in users:
                continue
            waiting[name] = tensor
            for piece in users[name]:
                if all(source in waiting for source in piece.sources):
                    self._place(piece, [waiting[source] for source in piece.sources])
            for source in {s for piece in users[name] for s in piece.sources}:
                if all(piece.name in self.tensors for piece in users[source]):
                    waiting.pop(source, None)
        refuse_missing(self.shape, seen)
        if self.cache is not None:
            self.cache.finish()

    def _place(self, piece: Piece, sources: list[torch.Tensor]) -> None:
        import ttnn

        packed = piece.group is not None and self.formats.packs(piece.group)
        host = ttnn.from_torch(
            piece.build(*(source.detach().bfloat16() for source in sources)),
            dtype=ttnn.bfloat8_b if packed else ttnn.bfloat16,
            layout=ttnn.TILE_LAYOUT if piece.tiled else ttnn.ROW_MAJOR_LAYOUT,
            mesh_mapper=ttnn.ReplicateTensorToMesh(self.device)
            if piece.split is None
            else ttnn.ShardTensorToMesh(self.device, dim=piece.split),
        )
        if self.cache is not None:
            self.cache.store(piece, host)
        self.tensors[piece.name] = ttnn.to_device(
            host, self.device, memory_config=ttnn.DRAM_MEMORY_CONFIG
        )


def _progress(items: Iterable[Any], label: str, total: int | None = None) -> Iterable[Any]:
    from tqdm import tqdm  # type: ignore[import-untyped]

    return tqdm(items, desc=label, total=total, leave=False, mininterval=1)
