"""Checkpoints without a layout: saved under global names, loadable in any layout.

Read in this order: `rectangle` (which part of a tensor a chunk holds), `manifest` (the format),
`save`, `load`, `verify`, `retention` (which checkpoint to resume from, which to remove). Below
them: `storage` (bytes on disk), `steps` (names of directories, the commit). Nothing is imported
here, so that reading a manifest needs no torch.
"""
