"""Low-bit weights as bytes: formats, numerics, packing, which layers. Every rank."""
