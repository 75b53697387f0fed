"""Kernels of the model's step on one kind of device. Every rank."""
