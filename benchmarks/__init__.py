"""Measuring programs: the load client behind benchmark.py, and kernels by themselves."""
