"""Which rows a run has read, and when: from its directory and the sources, on one process."""
