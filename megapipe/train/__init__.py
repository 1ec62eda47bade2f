"""From parts to a run: engine, optimizer, learning rate, checkpoints, metrics, the loop."""
