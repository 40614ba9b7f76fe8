"""Everything that decides a network's weights, and nothing else."""
