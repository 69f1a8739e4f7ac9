"""What SGLang offers to plugins, and what sglang-hma gives it."""

from sglang_hma.seam_list.seam import PluginPoint

PLUGIN_POINTS = (
    PluginPoint(
        "entry point `sglang.srt.platforms`: `hma`",
        "`sglang_hma:activate`",
        "selects the platform class by device",
    ),
    PluginPoint(
        "entry point `sglang.srt.plugins`: `hma`",
        "`sglang_hma:register`",
        "runs in every process before anything is built",
    ),
    PluginPoint(
        "`SRTPlatform` (CPU: out-of-tree; CUDA: subclass of `CudaSRTPlatform`, or out-of-tree "
        "where sgl_kernel is missing)",
        "`platforms/`",
        "the in-tree platforms need sgl_kernel",
    ),
    PluginPoint(
        "`register_attention_backend`, `add_attention_backend_choices`: `hma`",
        "`attention/backend.py`",
        "attention over both page formats",
    ),
    PluginPoint(
        "`register_resolution_hook`: `handle_model_specific_adjustments`",
        "`attention/listed.py`",
        "gpt-oss and EXAONE 4 are started only with an attention backend of a list; ours computes "
        "windows and sinks as well",
    ),
    PluginPoint(
        "`SGLANG_EXTERNAL_MODEL_PACKAGE`",
        "`served_model/`",
        "SGLang's own class of the served model, so that SGLang need not import all of its models",
    ),
    PluginPoint(
        "`sglang.srt.models.registry.ModelRegistry.models`",
        "`prefill/ttnn/server.py:CardCausalLM` for the `ARCHITECTURES` of `shape.py`",
        "with `--hma-prefill-runtime ttnn`: the model runs on a Tenstorrent card",
    ),
)
