"""CUDA C++ of our own, compiled by NVRTC at first use. Every rank on a CUDA card."""
