"""Tensor parallelism: linear layers, embedding and loss cut over the ranks of one axis."""
