"""Decode attention in CUDA C++ for NVIDIA GPUs from Ampere on; compiled when first needed."""
