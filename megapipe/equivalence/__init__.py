"""The equivalence check: a layout computes what one process computes."""
