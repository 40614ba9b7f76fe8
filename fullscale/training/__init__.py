"""Training: the code that determines a network's weights, and nothing else."""
