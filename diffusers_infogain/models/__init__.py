"""Models of public checkpoints that diffusers has no class for."""
