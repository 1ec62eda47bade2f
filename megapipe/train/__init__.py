"""From parts to a run: engine, checkpoints, metrics, the loop."""
