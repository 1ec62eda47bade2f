"""Megatron-LM's checkpoints, read without running anything that they hold.

records.py      what stands for the objects of a pickle
interpreter.py  the machine that a pickle is a program for
unpickler.py    pickle to records: `unpickle`
archive.py      the zip files that torch.save writes
assembly.py     global tensors out of the parts that files hold
metadata.py     where the chunks of a distributed checkpoint lie
torch_dist.py   core's distributed checkpoints
ranks.py        the files of a checkpoint with a directory for each rank
legacy.py       global tensors out of these
directory.py    either kind: `open_megatron`
"""
