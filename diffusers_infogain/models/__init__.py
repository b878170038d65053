"""Models that neither diffusers nor transformers has, and readers of public checkpoints."""
