"""Triton kernels, each with the torch reference beside it. They know nothing of ranks."""
