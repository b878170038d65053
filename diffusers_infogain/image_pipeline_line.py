"""The base class of image pipelines whose tokens are a line, each of which belongs to the whole image: TiTok and MaskGen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch

from .checks import check_choice, check_integer
from .components import in_float32
from .guidance import GUIDANCE_SCHEDULES
from .image_call import Canvas
from .image_pipeline import InfoGainImagePipeline


class LineImagePipeline(InfoGainImagePipeline):
    """Base class of image pipelines with a line of tokens (`latents` (B, 1, N)) and images of one size.

    Tokens have no place in the image: there is image to image (`image` and `strength`), but neither inpainting nor outpainting.
    The rule "halton" is the van der Corput sequence of base 3 along the line.

    Attributes:
        family_num_inference_steps: Number of steps of calls that give none, for models without a default of their own.
    """

    family_num_inference_steps: ClassVar[int]

    def register_defaults(self, guidance_schedule: str | None, num_inference_steps: int | None) -> None:
        """Checks and registers what calls take that say nothing else, which is saved with the model; None is the family's.

        Raises:
            ValueError: For an unknown schedule, or a number of steps below 1.
        """
        check_choice("default_guidance_schedule", guidance_schedule, tuple(GUIDANCE_SCHEDULES), optional=True)
        check_integer("default_num_inference_steps", num_inference_steps, 1, optional=True)
        given = {"default_guidance_schedule": guidance_schedule, "default_num_inference_steps": num_inference_steps}
        self.register_to_config(**{name: value for name, value in given.items() if value is not None})

    def check_codes(self, vqvae: Any, transformer: Any) -> None:
        """Raises a ValueError if the image tokenizer has other codes than the transformer."""
        if vqvae is None or transformer is None:
            return
        for name in ("codebook_size", "num_tokens"):
            if vqvae.config[name] != transformer.config[name]:
                raise ValueError(
                    f"`vqvae` must have the `{name}` {transformer.config[name]} of `transformer`, got {vqvae.config[name]}."
                )

    @property
    def default_num_inference_steps(self) -> int:  # type: ignore[override]
        """The number of steps of calls that give none."""
        return self.config.get("default_num_inference_steps", self.family_num_inference_steps)

    def canvas(self) -> Canvas:
        """The image tokens of the model."""
        config = self.transformer.config
        return Canvas(config.codebook_size, config.codebook_size + 1, side=1, only_side=True, line=config.num_tokens)

    def _state_images(
        self,
        tokens: torch.Tensor,
        mask_token_id: int,
        paste: Callable[[torch.Tensor], torch.Tensor] | None,
        output_type: str,
        **decoding: torch.Tensor,
    ) -> Any:
        """Masked tokens are hidden from the image tokenizer."""
        tokens = tokens.to(self.device_of("vqvae"))[:, 0]
        seen = tokens != mask_token_id
        pixels = self.decode_tokens(tokens.masked_fill(~seen, 0), None if seen.all() else seen, **decoding)
        images = self.image_processor.postprocess(pixels.clamp(*self.pixel_range), "pt")
        return self.image_processor.postprocess(images if paste is None else paste(images), output_type, [False] * len(images))

    def decode_tokens(self, tokens: torch.Tensor, seen: torch.Tensor | None = None) -> torch.Tensor:
        """Pixels (B, 3, H, W) of tokens (B, N), where they are `seen` (B, N), in float32."""
        return in_float32(self.vqvae).decode(tokens, seen=seen)

    def to_pixels(self, tokens: torch.Tensor, **decoding: torch.Tensor) -> torch.Tensor:
        """Pixels (B, 3, H, W) of tokens (B, 1, N), with further arguments of `decode_tokens`."""
        return self.decode_tokens(tokens[:, 0], **decoding).clamp(*self.pixel_range)

    def to_tokens(self, pixels: torch.Tensor) -> torch.Tensor:
        """Tokens (B, 1, N) of pixels (B, 3, H, W) in [0, 1]."""
        return in_float32(self.vqvae).encode(pixels)[:, None]
