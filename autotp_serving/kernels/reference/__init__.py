"""Portable torch on any device: what the kernels are compared with. Every rank."""
