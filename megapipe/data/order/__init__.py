"""Which row comes when: the rule that docs/data-order.md states, and nothing else."""
