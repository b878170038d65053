"""Weight files and repositories: read, checked, loaded as pipelines, and converted to diffusers' format."""
