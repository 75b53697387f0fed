"""Kernels in Triton, one source for CUDA and Intel GPUs. Every rank, on the device.

They keep to what Triton 3.3 (the last for the Arc A-series) and 3.6 both compile, and use no fp64.
"""
