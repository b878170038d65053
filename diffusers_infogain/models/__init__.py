"""Public checkpoints' models that neither diffusers nor transformers has."""
