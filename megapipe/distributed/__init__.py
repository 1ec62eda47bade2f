"""The ranks of a run: how they start and meet, where each stands, and what passes between them.

| module | holds |
|---|---|
| `launcher` | starting ranks on this machine, and the one cause when they fail |
| `rendezvous` | a rank's place in a job of torchrun or Slurm, and joining the others |
| `job_store`, `meeting` | the store in which the ranks of a job meet, and who is missing there |
| `node_list` | Slurm's short forms of host names |
| `mesh` | which rank stands where on the pipeline, data and tensor axes |
| `rank_group` | JSON values and errors between ranks |
| `shared_memory` | tensors between processes of one machine that compute on its CPUs |
"""
