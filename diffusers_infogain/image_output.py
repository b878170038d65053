"""What a call of an image pipeline returns."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import PIL.Image
import torch
from diffusers.utils import BaseOutput

from .printing import summary
from .trace import DecodingTrace


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
