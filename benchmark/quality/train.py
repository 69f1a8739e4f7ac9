"""Train the small Qwen3 of docs/quality.md on the standard library's sources.

The architecture of the paper's models (q/k norms, grouped heads of 64), small enough for the
repository, with weights that mean something. On a CPU the same seed, library, torch and number of
threads give the same weights; a GPU does not add in one order. It goes on where an interrupted run
with the same arguments stopped.
"""

import argparse
import json
import math
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from benchmark.common import console
from benchmark.quality import ngram, text
from sglang_hma.demo.random_model import train_bpe

MODEL = Path(__file__).parent / "model"
CHECKPOINT = Path("build/quality/train.pt")
VOCAB, CONTEXT = 2048, 1024
WINDOW = 512  # tokens of a sample
RATE, WARM_UP, DECAY, BETAS = 3e-3, 100, 0.1, (0.9, 0.95)
KEPT_EVERY = 100
HELD_OUT_WINDOWS = 100
END = "<|endoftext|>"


def tokenizer_of(texts: list[str]) -> Any:
    from transformers import PreTrainedTokenizerFast

    bpe = train_bpe(texts, VOCAB, [END])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END, model_max_length=CONTEXT)


def encoded(tokenizer: Any, texts: list[str]) -> np.ndarray:
    end = tokenizer.convert_tokens_to_ids(END)
    pieces = tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
    return np.concatenate([np.array([*piece.ids, end], dtype=np.uint16) for piece in pieces])


def new_model(seed: int) -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=VOCAB,
            num_hidden_layers=8,
            hidden_size=192,
            intermediate_size=512,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def rate_of(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine down to a tenth."""
    if step < WARM_UP:
        return RATE * (step + 1) / WARM_UP
    done = (step - WARM_UP) / max(1, steps - WARM_UP)
    return RATE * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))


def batch(data: np.ndarray, size: int, seed: int, step: int) -> torch.Tensor:
    """Step `step`'s samples, whatever came before."""
    starts = np.random.default_rng([seed, step]).integers(0, len(data) - WINDOW - 1, size)
    rows = np.stack([data[start : start + WINDOW + 1] for start in starts])
    return torch.from_numpy(rows.astype(np.int64))


def loss_of(model: Any, rows: torch.Tensor) -> torch.Tensor:
    rows = rows.to(model.device)
    logits = model(rows[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())


@torch.inference_mode()
def perplexity(model: Any, data: np.ndarray) -> float:
    """Over windows of the held-out files; each token sees those before it in its window."""
    count = min(HELD_OUT_WINDOWS, (len(data) - 1) // WINDOW)
    losses = []
    for start in range(0, count * WINDOW, WINDOW):
        rows = torch.from_numpy(data[start : start + WINDOW + 1].astype(np.int64))[None]
        losses.append(float(loss_of(model, rows)))
    return math.exp(sum(losses) / len(losses))


def train(model: Any, data: np.ndarray, args: argparse.Namespace) -> None:
    plain = [p for p in model.parameters() if p.dim() < 2]
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": DECAY}, {"params": plain, "weight_decay": 0.0}],
        lr=RATE,
        betas=BETAS,
    )
    this = {"seed": args.seed, "steps": args.steps, "batch": args.batch, "tokens": len(data)}
    first = 0
    if CHECKPOINT.is_file():
        kept = torch.load(CHECKPOINT, weights_only=True)
        if kept["this"] == this:
            model.load_state_dict(kept["model"])
            optimizer.load_state_dict(kept["optimizer"])
            first = kept["step"]
            console.print(f"goes on after step {first} of {args.steps}")
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("training", total=args.steps, completed=first)
        for step in range(first, args.steps):
            for group in optimizer.param_groups:
                group["lr"] = rate_of(step, args.steps)
            loss = loss_of(model, batch(data, args.batch, args.seed, step))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            progress.update(task, advance=1, description=f"step {step}, loss {float(loss):.3f}")
            if (step + 1) % KEPT_EVERY == 0:
                keep(CHECKPOINT, this, step + 1, model, optimizer)
                print(f"step {step + 1}, loss {float(loss):.3f}", flush=True)


def keep(path: Path, this: dict[str, int], step: int, model: Any, optimizer: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    states = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save({"this": this, "step": step, **states}, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


def main() -> None:
    parsing = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parsing.add_argument("--steps", type=int, default=2500)
    parsing.add_argument("--batch", type=int, default=8, help=f"samples of {WINDOW} tokens a step")
    parsing.add_argument("--device", default="cpu", help="cpu or cuda")
    parsing.add_argument(
        "--library", type=Path, default=text.STANDARD_LIBRARY, metavar="DIR", help="what to learn"
    )
    parsing.add_argument("--seed", type=int, default=0)
    parsing.add_argument("--out", type=Path, default=MODEL, metavar="DIR")
    args = parsing.parse_args()

    texts = {
        held: list(text.sources(held_out=held, library=args.library)) for held in (False, True)
    }
    tokenizer = tokenizer_of(texts[False])
    data, held_out = (encoded(tokenizer, texts[held]) for held in (False, True))
    console.print(f"{len(data)} tokens to learn from, {len(held_out)} held out")
    model = new_model(args.seed).to(args.device)
    began = time.monotonic()
    train(model, data, args)
    model.eval()
    scored = held_out[: HELD_OUT_WINDOWS * WINDOW + 1]
    figures = {
        "held_out_perplexity": perplexity(model, held_out),
        "trigram_perplexity": ngram.perplexity(data, scored, VOCAB),
    }
    model.to(torch.bfloat16)
    figures["held_out_perplexity_bf16"] = perplexity(model, held_out)
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    how = {
        "seed": args.seed,
        "steps": args.steps,
        "tokens_a_step": args.batch * WINDOW,
        "tokens_of_text": len(data),
        "parameters": sum(p.numel() for p in model.parameters()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "seconds_of_this_run": round(time.monotonic() - began),
    }
    (args.out / "training.json").write_text(json.dumps(figures | how, indent=1) + "\n")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
