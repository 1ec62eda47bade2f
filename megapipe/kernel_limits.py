"""The largest sizes that the Triton kernels take.

A test compares them with the kernels' own limits, which can't be imported without torch.
"""

MAX_KERNEL_HIDDEN = 16384
MAX_KERNEL_HEAD_DIM = 256
