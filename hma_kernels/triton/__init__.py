"""Kernels in Triton, for any GPU that it knows."""
