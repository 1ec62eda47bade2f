"""Models of other stacks: read, written, proven."""
