"""Samplers for masked diffusion models in the Hugging Face world: information gain, and every rule it is compared with."""

from pathlib import Path

from .decoding import DecodingOutput, DecodingTrace, decode, decode_beam, decode_best_of
from .image_generation import InfoGainPipelineOutput
from .loading import load
from .pipeline_infogain import DEMO_MODEL, InfoGainPipeline
from .pipeline_infogain_lumina import InfoGainLuminaPipeline
from .pipeline_infogain_maskgit import InfoGainMaskGITPipeline
from .pipeline_infogain_meissonic import InfoGainMeissonicPipeline
from .pipeline_infogain_mmada import InfoGainMMaDAPipeline
from .pipeline_infogain_text import InfoGainTextPipeline
from .scheduling_infogain import PRESETS, InfoGainProposal, InfoGainScheduler, InfoGainSchedulerOutput
from .text_generation import InfoGainTextOutput

__version__ = "0.1.0"

CUSTOM_PIPELINE = str(Path(__file__).parent / "custom_pipeline.py")
"""File for the argument `custom_pipeline` of `DiffusionPipeline.from_pretrained`."""

__all__ = [
    "CUSTOM_PIPELINE",
    "DEMO_MODEL",
    "PRESETS",
    "DecodingOutput",
    "DecodingTrace",
    "InfoGainLuminaPipeline",
    "InfoGainMMaDAPipeline",
    "InfoGainMaskGITPipeline",
    "InfoGainMeissonicPipeline",
    "InfoGainPipeline",
    "InfoGainPipelineOutput",
    "InfoGainProposal",
    "InfoGainScheduler",
    "InfoGainSchedulerOutput",
    "InfoGainTextOutput",
    "InfoGainTextPipeline",
    "decode",
    "decode_beam",
    "decode_best_of",
    "load",
]
