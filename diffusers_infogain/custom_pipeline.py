"""A stub to pass as `custom_pipeline=diffusers_infogain.CUSTOM_PIPELINE` to `DiffusionPipeline.from_pretrained`."""

# diffusers copies this file elsewhere and runs the copy, so it can only import the installed package.
from diffusers_infogain import InfoGainPipeline  # noqa: F401
