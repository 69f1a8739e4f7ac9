"""Every hook of sglang-hma into SGLang, with its reason.

docs/sglang-seams.md is generated from this list (scripts/seams_doc.py); seams.py applies it.
"""

from sglang_hma.seam_list.plugin_points import PLUGIN_POINTS
from sglang_hma.seam_list.serving import SERVING
from sglang_hma.seam_list.transfer import TRANSFER

__all__ = ["PLUGIN_POINTS", "SEAMS"]

SEAMS = (*SERVING, *TRANSFER)
