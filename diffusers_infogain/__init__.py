"""Samplers for masked diffusion models in the Hugging Face world: information gain, and every rule it is compared with."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .choices import PRESETS
    from .decoding import DecodingOutput, decode
    from .denoising import Denoised
    from .exporting import export_pipeline
    from .image_output import InfoGainPipelineOutput
    from .loading import load
    from .pipeline_infogain import DEMO_MODEL, InfoGainPipeline
    from .pipeline_infogain_lumina import InfoGainLuminaPipeline
    from .pipeline_infogain_maskgen import InfoGainMaskGenPipeline
    from .pipeline_infogain_maskgit import InfoGainMaskGITPipeline
    from .pipeline_infogain_meissonic import InfoGainMeissonicPipeline
    from .pipeline_infogain_mmada import InfoGainMMaDAPipeline
    from .pipeline_infogain_showo import InfoGainShowoPipeline
    from .pipeline_infogain_text import InfoGainTextPipeline
    from .pipeline_infogain_titok import InfoGainTiTokPipeline
    from .proposal import InfoGainProposal, InfoGainSchedulerOutput
    from .scheduling_infogain import InfoGainScheduler
    from .search import decode_beam, decode_best_of
    from .text_output import InfoGainTextOutput
    from .trace import DecodingTrace

__version__ = "0.1.0"

CUSTOM_PIPELINE = str(Path(__file__).parent / "custom_pipeline.py")
"""File for the argument `custom_pipeline` of `DiffusionPipeline.from_pretrained`."""

__all__ = [
    "CUSTOM_PIPELINE",
    "DEMO_MODEL",
    "PRESETS",
    "DecodingOutput",
    "DecodingTrace",
    "Denoised",
    "InfoGainLuminaPipeline",
    "InfoGainMMaDAPipeline",
    "InfoGainMaskGITPipeline",
    "InfoGainMaskGenPipeline",
    "InfoGainMeissonicPipeline",
    "InfoGainPipeline",
    "InfoGainPipelineOutput",
    "InfoGainProposal",
    "InfoGainScheduler",
    "InfoGainSchedulerOutput",
    "InfoGainShowoPipeline",
    "InfoGainTextOutput",
    "InfoGainTextPipeline",
    "InfoGainTiTokPipeline",
    "decode",
    "decode_beam",
    "decode_best_of",
    "export_pipeline",
    "load",
]

# Torch, diffusers and transformers take seconds to import. A name is imported when it is first asked for.
_MODULES = {
    "DEMO_MODEL": "pipeline_infogain",
    "PRESETS": "choices",
    "DecodingOutput": "decoding",
    "DecodingTrace": "trace",
    "Denoised": "denoising",
    "InfoGainLuminaPipeline": "pipeline_infogain_lumina",
    "InfoGainMMaDAPipeline": "pipeline_infogain_mmada",
    "InfoGainMaskGITPipeline": "pipeline_infogain_maskgit",
    "InfoGainMaskGenPipeline": "pipeline_infogain_maskgen",
    "InfoGainMeissonicPipeline": "pipeline_infogain_meissonic",
    "InfoGainPipeline": "pipeline_infogain",
    "InfoGainPipelineOutput": "image_output",
    "InfoGainProposal": "proposal",
    "InfoGainScheduler": "scheduling_infogain",
    "InfoGainSchedulerOutput": "proposal",
    "InfoGainShowoPipeline": "pipeline_infogain_showo",
    "InfoGainTextOutput": "text_output",
    "InfoGainTextPipeline": "pipeline_infogain_text",
    "InfoGainTiTokPipeline": "pipeline_infogain_titok",
    "decode": "decoding",
    "decode_beam": "search",
    "decode_best_of": "search",
    "export_pipeline": "exporting",
    "load": "loading",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
