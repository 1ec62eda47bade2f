"""Data parallelism: contiguous buffers of parameters and gradients, and their reduction."""
