"""Layers that stand in for a model's own: low-bit linears, head, un-fused parts. Every rank."""
