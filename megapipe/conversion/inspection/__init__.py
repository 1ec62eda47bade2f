"""What is in a directory of tensors: statistics, and how two of them differ.

Nothing is imported here, so that a summary of a checkpoint needs no torch.
"""
