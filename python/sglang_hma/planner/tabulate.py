"""python -m sglang_hma.planner.tabulate: ask aiconfigurator-core for step times, once.

Needs the extra `planner`. Writes one file a card, which the planner reads from then on.
"""

import argparse
import json
import logging
import sys
import tempfile
from pathlib import Path
from typing import Any

import msgspec

from sglang_hma.planner.model_shape import KNOWN, ModelShape
from sglang_hma.planner.silicon import Table, Tables

SYSTEMS = {
    "a100-sxm-80": "a100_sxm",
    "h100-sxm": "h100_sxm",
    "h200-sxm": "h200_sxm",
    "l40s": "l40s",
    "rtx-pro-6000": "rtx_pro_6000_server",
}
TOKENS = [1, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536]
BATCHES = [1, 2, 4, 8, 16, 32, 64, 128, 256]
CONTEXTS = [1, 128, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536]
CARDS = (1, 2, 4)


def config_of(shape: ModelShape) -> dict[str, Any]:
    """A config.json that says the same."""
    qwen = shape.name.startswith("Qwen3")
    return {
        "architectures": ["Qwen3ForCausalLM" if qwen else "LlamaForCausalLM"],
        "model_type": "qwen3" if qwen else "llama",
        "num_hidden_layers": shape.layers,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab,
        "tie_word_embeddings": shape.tied,
        "max_position_embeddings": 131072,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "torch_dtype": "bfloat16",
    }


class Asker:
    """Of one card and one model."""

    def __init__(self, system: str, shape: ModelShape, cards: int) -> None:
        from aiconfigurator_core.sdk import common, config, models, perf_database
        from aiconfigurator_core.sdk.backends.factory import get_backend

        self._config: Any = config
        version = perf_database.get_latest_database_version(system=system, backend="sglang")
        if version is None:
            raise SystemExit(f"tabulate: error: no operators of {system} with SGLang")
        self.version: str = version
        self._database: Any = perf_database.get_database(
            system=system, backend="sglang", version=version
        )
        precision = config.ModelConfig(
            tp_size=cards,
            pp_size=1,
            gemm_quant_mode=common.GEMMQuantMode.bfloat16,
            kvcache_quant_mode=common.KVCacheQuantMode.bfloat16,
            fmha_quant_mode=common.FMHAQuantMode.bfloat16,
        )
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps(config_of(shape)))
            self._model = models.get_model(folder, precision, "sglang")
        self._backend = get_backend("sglang")

    def prefill(self, tokens: int) -> tuple[float, float]:
        """Seconds of all but attention, and of attention, of one prompt."""
        return self._ask("static_ctx", 1, tokens, 1, "context")

    def decode(self, batch: int, context: int) -> tuple[float, float]:
        """Of a step."""
        return self._ask("static_gen", batch, context, 2, "generation")

    def _ask(
        self, mode: str, batch: int, tokens: int, made: int, phase: str
    ) -> tuple[float, float]:
        runtime = self._config.RuntimeConfig(batch_size=batch, isl=tokens, osl=made)
        summary = self._backend.run_static(self._model, self._database, runtime, mode, 1, 1.0)
        times: dict[str, float] = getattr(summary, f"get_{phase}_latency_dict")()
        attention = times.pop(f"{phase}_attention")
        return sum(times.values()) / 1e3, attention / 1e3


def table_of(asker: Asker, cards: int) -> Table:
    prefills = [asker.prefill(tokens) for tokens in TOKENS]
    decodes = [[asker.decode(batch, context) for context in CONTEXTS] for batch in BATCHES]
    return Table(
        cards=cards,
        tokens=TOKENS,
        prefill_linear=[linear for linear, _ in prefills],
        prefill_attention=[attention for _, attention in prefills],
        batches=BATCHES,
        decode_linear=[row[0][0] for row in decodes],
        contexts=CONTEXTS,
        decode_attention=[[attention for _, attention in row] for row in decodes],
    )


def main() -> None:
    parser = argparse.ArgumentParser("python -m sglang_hma.planner.tabulate", description=__doc__)
    parser.add_argument("--card", nargs="+", default=list(SYSTEMS), choices=list(SYSTEMS))
    parser.add_argument("--model", nargs="+", default=list(KNOWN), choices=list(KNOWN))
    parser.add_argument("folder", type=Path, help="where to; one file a card")
    args = parser.parse_args()
    logging.disable(logging.CRITICAL)
    try:
        import aiconfigurator_core
    except ImportError:
        sys.exit("tabulate: error: needs aiconfigurator-core: pip install 'sglang-hma[planner]'")
    args.folder.mkdir(parents=True, exist_ok=True)
    for card in args.card:
        models: dict[str, list[Table]] = {}
        version = ""
        for name in args.model:
            models[name] = []
            for cards in CARDS:
                asker = Asker(SYSTEMS[card], KNOWN[name], cards)
                version = asker.version
                models[name].append(_rounded(table_of(asker, cards)))
            print(f"{card} {name}", flush=True)
        release = getattr(aiconfigurator_core, "__version__", "0.12.0")
        source = (
            f"AIConfigurator {release} (Apache-2.0), operators measured on {SYSTEMS[card]} "
            f"with SGLang {version}"
        )
        text = msgspec.json.format(msgspec.json.encode(Tables(source, models)), indent=0)
        (args.folder / f"{card}.json").write_bytes(text)


def _rounded(table: Table) -> Table:
    def short(value: Any) -> Any:
        if isinstance(value, list):
            return [short(each) for each in value]
        return float(f"{value:.4g}") if isinstance(value, float) else value

    return Table(**{name: short(value) for name, value in msgspec.structs.asdict(table).items()})


if __name__ == "__main__":
    main()
