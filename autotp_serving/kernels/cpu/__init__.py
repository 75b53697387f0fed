"""Kernels for CPUs with AVX2 or more, from csrc/, compiled at first use. Every rank on CPU."""
