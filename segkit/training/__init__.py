"""The training loop of one phase, its checkpoints, its ranks and its records."""
