"""Stub for `DiffusionPipeline.from_pretrained(..., custom_pipeline=diffusers_infogain.CUSTOM_PIPELINE, trust_remote_code=True)`."""

# diffusers copies this file elsewhere and runs the copy, so it can only import the installed package.
from diffusers_infogain import InfoGainPipeline  # noqa: F401
