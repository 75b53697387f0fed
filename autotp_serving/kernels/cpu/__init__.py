"""Kernels that multiply by low-bit weights on one kind of device. Every rank."""
