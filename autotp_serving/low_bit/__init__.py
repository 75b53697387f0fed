"""Low-bit weights: formats (bytes), linear modules, kernels per device. Runs on every rank."""
