"""Models of other stacks: read, written, and proven to compute the same."""
