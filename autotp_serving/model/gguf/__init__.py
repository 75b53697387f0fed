"""GGUF files as models: their metadata as a folder, their tensors as a checkpoint. Every rank."""
