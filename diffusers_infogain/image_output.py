"""What a call of an image pipeline returns."""

from __future__ import annotations

import base64
import html
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import BaseOutput

from . import __version__
from .printing import summary
from .trace import DecodingTrace
from .trace_film import enlarged
from .trace_text import html_outputs

_SHOWN = 16
"""The most images that a notebook shows of an output."""
_LARGEST = 512
"""Pixels along the longer side, to which a notebook's images are reduced."""


@dataclass
class InfoGainPipelineOutput(BaseOutput):
    """Images, and how they were decoded.

    Attributes:
        images: PIL images, whose PNG files carry their settings, a NumPy array (B, H, W, 3) or a tensor (B, 3, H, W) in [0, 1],
            or tokens (B, h, w), by `output_type`.
        trace: The decoding's `DecodingTrace`: cost, gain, winner, positions and NFE per step and image.
        seeds: The seed of every image: `generator=torch.Generator(device).manual_seed(seed)` generates it again on its own.
    """

    images: list[PIL.Image.Image] | np.ndarray | torch.Tensor
    trace: DecodingTrace
    seeds: list[int]

    def __repr__(self) -> str:
        return summary(self)

    def _repr_html_(self) -> str | None:
        """The first images, small ones enlarged, and what they took, for notebooks; nothing if they are tokens."""
        images = self._as_pil()
        if images is None:
            return None
        style = "display:inline-block;margin:0 6px 6px 0;max-width:100%;image-rendering:pixelated"
        parts = [
            f'<img src="{_data_url(image)}" alt="image {number} with seed {seed}" title="seed {seed}" style="{style}">'
            for number, (image, seed) in enumerate(zip(images[:_SHOWN], self.seeds, strict=False), 1)
        ]
        return html_outputs([f"<p>{html.escape(self.trace.took())}</p>", *parts], max(len(images) - _SHOWN, 0))

    def _as_pil(self) -> list[PIL.Image.Image] | None:
        images = self.images
        if isinstance(images, torch.Tensor):
            if images.ndim != 4:
                return None
            images = VaeImageProcessor.pt_to_numpy(images)
        return VaeImageProcessor.numpy_to_pil(images) if isinstance(images, np.ndarray) else images


def _data_url(image: PIL.Image.Image) -> str:
    """An image as an address that holds it: enlarged if it is small, and reduced, with some loss, if it is large."""
    content, kind = io.BytesIO(), "png"
    if max(image.size) > _LARGEST:
        kind = "jpeg"
        image = enlarged(image, _LARGEST)
    elif max(image.size) < 256:
        image = enlarged(image)
    image.convert("RGB").save(content, kind, quality=90)
    return f"data:image/{kind};base64,{base64.b64encode(content.getvalue()).decode()}"


def recorded(pipe: Any, call: Any, index: int, seed: int) -> dict[str, Any]:
    """What generates an image again, for its file; embeddings and latents that were given are not in it, nor are images.

    Args:
        pipe: The image pipeline.
        call: Its `ImageCall`.
        index, seed: Of the image.
    """
    inputs = {name: call.inputs[name] for name in pipe.recorded_inputs if call.inputs[name] is not None}
    name = str(pipe.config.get("_name_or_path") or "")
    # Of a folder only its name: the path says more about the machine than about the image.
    model = {"model": Path(name).name if Path(name).exists() else name} if name else {}
    return {
        **{name: call.per_image(value)[index] for name, value in inputs.items()},
        "seed": seed,
        **model,
        "pipeline": type(pipe).__name__,
        "version": __version__,
        "num_inference_steps": call.num_inference_steps,
        "guidance_scale": call.guidance_scale,
        "guidance_schedule": call.guidance_schedule,
        "guidance_interval": list(call.guidance_interval),
        "guided_lookahead": call.guided_lookahead,
        "height": call.height,
        "width": call.width,
        "num_beams": call.num_beams,
        "num_runs": call.num_runs,
        **({} if call.cache is None else {"approximate_cache": call.approximate_cache}),
        **{name: values[index] for name, values in call.notes.items()},
        **({} if call.edit is None else call.edit.record(index)),
        "scheduler": {key: value for key, value in call.scheduler.config.items() if not key.startswith("_")},
    }
