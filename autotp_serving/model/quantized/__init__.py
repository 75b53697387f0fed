"""Checkpoints that others have quantized: what their files mean, and what becomes of it here."""
