"""Models with public weights that diffusers has no class for, and the ways to read their checkpoints."""
