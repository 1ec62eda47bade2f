"""The layout of a run: which rank holds and does what, resolved once from config and world size."""
