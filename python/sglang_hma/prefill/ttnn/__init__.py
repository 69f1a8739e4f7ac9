"""Prefill on Tenstorrent cards through ttnn. Imported only where that runtime was chosen."""
