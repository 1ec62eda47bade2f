"""`megapipe data audit`: everything that a run's data holds, read once, in parallel."""
