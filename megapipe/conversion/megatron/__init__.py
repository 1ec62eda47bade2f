"""Megatron-LM's checkpoints, read without running anything that they hold.

records.py    what stands for the objects of a pickle
unpickler.py  pickle to records: an interpreter that imports and calls nothing
archive.py    the zip files that torch.save writes
strided.py    tensors as ranges of files
assembly.py   global tensors out of the parts that the ranks hold
torch_dist.py core's distributed checkpoints
legacy.py     a directory for each rank
directory.py  either of them: `open_megatron`
"""
