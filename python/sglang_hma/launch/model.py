"""Which models a server refuses, in one line each: those without plain KV pages."""

from typing import Any

from sglang_hma.config import PAGE_TOKENS, HmaConfig
from sglang_hma.launch.checks import one_line
from sglang_hma.launch.flags import Refusal
from sglang_hma.launch.windows import ALIKE, has_two_pools

SOFTCAP = "attn_logit_softcapping"

EXAONE_BASE = 1e6  # of its rotary embedding


def check_model(config: HmaConfig, server_args: Any) -> Any:
    """SGLang's ModelConfig, of a model in one pool unless it is one for two. Raises Refusal."""

    model = model_config(server_args)
    name = (model.hf_config.architectures or ["model"])[0]
    # A card computes what it takes; the decode server, which cannot, refuses for both.
    if not config.on_card and (missing := left_out(name, model.hf_config)):
        raise Refusal(f"{name} has {missing}: the answers would be another model's")
    if not config.packs_kv:
        if config.device == "cpu" and getattr(model.hf_text_config, SOFTCAP, None):
            raise Refusal(
                f"{name} has {SOFTCAP}, which SGLang's own attention on a CPU leaves out: serve it "
                "with --hma-kv-format bfp8"
            )
        return model
    _check_pages(name, model, "serve it with --hma-kv-format native")
    if model.is_hybrid_swa and not has_two_pools(config, server_args, name):
        server_args.disable_hybrid_swa_memory = True
        model = model_config(server_args)
    if config.on_card:
        _check_for_card(config, server_args, model.hf_config)
    return model


def check_draft_model(server_args: Any, target: Any) -> Any:
    """SGLang's ModelConfig of the model that drafts for `target`, or None. Raises Refusal."""
    if server_args.speculative_algorithm != "STANDALONE":
        return None
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.utils.hf_transformers_utils import get_context_length

    server_args.disable_hybrid_swa_memory = True  # a draft's layers share the target's one table
    given = f"--speculative-draft-model-path is {server_args.speculative_draft_model_path}"
    try:
        model = ModelConfig.from_server_args(
            server_args,
            model_path=server_args.speculative_draft_model_path,
            model_revision=server_args.speculative_draft_model_revision,
            is_draft_model=True,
            context_length=1,  # the target's counts; how far it reads is looked at below
        )
    except Exception as error:
        raise Refusal(f"{given}: {one_line(error)}") from error
    name = (model.hf_config.architectures or ["model"])[0]
    _check_pages(name, model, "draft with another model")
    if model.vocab_size != target.vocab_size:
        raise Refusal(
            f"{given}: it has {model.vocab_size} tokens, the model that it drafts for "
            f"{target.vocab_size}: draft with a model of the same vocabulary"
        )
    reads = get_context_length(model.hf_text_config)
    if reads < target.context_len:
        raise Refusal(
            f"{given}: it reads {reads} tokens, the model that it drafts for "
            f"{target.context_len}: add --context-length {reads}"
        )
    return model


def _check_pages(name: str, model: Any, remedy: str) -> None:
    """Refuse a model whose KV does not go into pages."""
    from sglang.srt.configs.model_config import AttentionArch, is_hybrid_swa_model

    if model.attention_arch != AttentionArch.MHA:
        raise Refusal(
            f"{name} uses {model.attention_arch.name} attention, BFP8 pages need MHA/GQA: {remedy}"
        )
    from sglang.srt.configs.hybrid_arch import mambaish_config

    if mambaish_config(model) is not None:
        raise Refusal(
            f"{name} has state-space layers, BFP8 pages need MHA/GQA in every layer: {remedy}"
        )
    if name not in ALIKE and is_hybrid_swa_model([name], model.hf_text_config):
        raise Refusal(f"{name} mixes sliding-window and full attention in two KV pools: {remedy}")
    for label, dim in (("head_dim", model.head_dim), ("v_head_dim", model.v_head_dim)):
        if dim % PAGE_TOKENS:
            raise Refusal(
                f"{name} has {label} {dim}, BFP8 tiles need a multiple of {PAGE_TOKENS}: {remedy}"
            )
    if str(model.dtype) == "torch.float16":
        raise Refusal(f"{name} is float16: add --dtype bfloat16, K and V are kept in BFP8 and BF16")


def model_config(server_args: Any) -> Any:
    """SGLang's. Raises Refusal."""
    from sglang.srt.configs.model_config import ModelConfig

    try:
        return ModelConfig.from_server_args(server_args)
    except Exception as error:  # whatever transformers makes of a broken config
        raise Refusal(f"--model-path is {server_args.model_path}: {one_line(error)}") from error


def left_out(name: str, hf_config: Any) -> str:
    """What SGLang does not compute of a model and does not say so, or ""."""
    if name == "LlamaForCausalLM" and getattr(hf_config, "mlp_bias", False):
        return "mlp_bias, and SGLang leaves out the biases of its MLPs"
    # By this size SGLang tells the 7B models, with rotary embeddings, from the 13B ones.
    if name == "BaichuanForCausalLM" and hf_config.hidden_size != 4096:
        return "ALiBi, and SGLang gives its slopes to attention on NPUs alone"
    if name == "Exaone4ForCausalLM":
        base = (getattr(hf_config, "rope_parameters", None) or {}).get("rope_theta", EXAONE_BASE)
        if base != EXAONE_BASE:
            return f"rope_theta {base:g}, and SGLang takes {EXAONE_BASE:g} for every one"
    return ""


def _check_for_card(config: HmaConfig, server_args: Any, hf_config: Any) -> None:
    """Its config, and the files of the checkpoint if they are on this host already."""
    from sglang_hma.prefill.ttnn.checkpoint import OddCheckpoint, check_files
    from sglang_hma.prefill.ttnn.config_fields import check_fields
    from sglang_hma.prefill.ttnn.errors import UnsupportedModel
    from sglang_hma.prefill.ttnn.shape import ModelShape
    from sglang_hma.prefill.ttnn.weights import checkpoint_folder

    try:
        check_fields(hf_config)
        shape = ModelShape.of(hf_config)
        shape.split(config.chips)
    except UnsupportedModel as error:
        raise Refusal(f"{error}: serve it with --hma-prefill-runtime reference") from None
    path, revision = server_args.model_path, server_args.revision
    folder = checkpoint_folder(path, revision, server_args.download_dir)
    try:
        if folder is not None:
            check_files(folder, shape)
    except OddCheckpoint as error:
        raise Refusal(f"--model-path is {path}: {error}") from None
