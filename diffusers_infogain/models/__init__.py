"""Networks that neither diffusers nor transformers has."""
