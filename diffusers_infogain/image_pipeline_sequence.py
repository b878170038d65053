"""The base class of image pipelines of language models, whose prompt and image are one sequence."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from transformers import PreTrainedTokenizerBase

from .checks import check_integer
from .image_call import Canvas, Condition, ImageCall
from .image_pipeline import InfoGainImagePipeline
from .lora import LanguageModelLoraMixin
from .models.llada import BidirectionalLlama, check_image_tokens, predict_after_prompts
from .models.omni_phi import OmniPhi
from .models.partial_rows import PartialRows, run_llama

Encoded = tuple[torch.Tensor, torch.Tensor]
"""The ids of prompts (B, P), padded on the left, and a mask (B, P), False at padding."""


class SequenceImagePipeline(InfoGainImagePipeline, LanguageModelLoraMixin):
    """Base class of image pipelines of language models, which see the prompt and the image as one sequence.

    Image code c is the token `image_token_offset + c`. `scheduler` sees the image tokens only, as codes, with the codebook's size
    as mask id. A family defines `encode_prompt`, the layout of the image by `lay_out`, and the longest sequence by `max_length`.

    Attributes:
        unconditional_prompt: What guidance steers away from where there is no negative prompt, or an empty one.
    """

    model_cpu_offload_seq = "transformer->vqvae"
    guidance_offset = 1
    batches_guidance = False
    runs_partial_rows = True
    unconditional_prompt: ClassVar[str] = ""

    tokenizer: PreTrainedTokenizerBase
    transformer: BidirectionalLlama | OmniPhi

    def register_layout(self, image_token_offset: int | None, sample_size: int, **layout: int) -> None:
        """Checks and registers the ids and lengths of a family's sequences, in its constructor.

        Raises:
            ValueError: If one is no integer from 0 on, or the image tokens exceed the transformer's vocabulary.
        """
        layout["sample_size"] = sample_size
        for name, value in layout.items():
            check_integer(name, value, 0)
        if image_token_offset is not None and self.vqvae is not None and self.transformer is not None:
            check_image_tokens(image_token_offset, self.codebook_size, self.transformer.config.vocab_size)
        self.register_to_config(image_token_offset=image_token_offset, **layout)

    @property
    def image_token_offset(self) -> int:
        """Id of image code 0."""
        offset = self.config.image_token_offset
        return len(self.tokenizer) if offset is None else offset

    @property
    def codebook_size(self) -> int:
        """Number of image codes: that of `vqvae`, or, without one, the scheduler's mask id, which follows the codes."""
        return self.scheduler.config.mask_token_id if self.vqvae is None else self.vqvae.config.num_vq_embeddings

    @property
    def max_length(self) -> int:
        """Maximal number of tokens of prompt and image together."""
        raise NotImplementedError(f"{type(self).__name__} must define `max_length`.")

    def lay_out(self, image: torch.Tensor, where: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The part of the sequence that follows the prompt, and where in it the wanted positions are.

        Args:
            image: Token ids of the image (R, h, w), long.
            where: The wanted positions of the image (R, h, w), bool.

        Returns:
            Both as sequences (R, S).
        """
        raise NotImplementedError(f"{type(self).__name__} must define `lay_out`.")

    def encode_prompt(self, prompts: list[str]) -> Encoded:
        """The ids of prompts (B, P), padded on the left, and a mask (B, P), False at padding."""
        raise NotImplementedError(f"{type(self).__name__} must define `encode_prompt`.")

    def canvas(self) -> Canvas:
        """The image tokens of the model."""
        return Canvas(self.codebook_size, self.transformer.config.vocab_size, self.config.sample_size)

    def encode(self, call: ImageCall, prompt: Any, negative_prompt: Any) -> tuple[Condition, *tuple[Condition | None, ...]]:
        """The ids of the prompts, and with guidance of the negative ones.

        Raises:
            ValueError: If prompt and image together are longer than the model takes.
        """
        negatives = self.encode_prompt(self.negative_prompts(call, negative_prompt)) if call.guided else None
        return self.conditions(call, self.encode_prompt(call.per_image(prompt)), negatives)

    def negative_prompts(self, call: ImageCall, negative_prompt: Any) -> list[str]:
        """What guidance steers each image away from."""
        return [text or self.unconditional_prompt for text in call.per_image(negative_prompt or "")]

    def conditions(
        self, call: ImageCall, positive: Encoded, *negatives: Encoded | None
    ) -> tuple[Condition, *tuple[Condition | None, ...]]:
        """Prompts from `encode_prompt` as the condition and the negative ones of a call.

        Raises:
            ValueError: If prompt and image together are longer than the model takes.
        """
        every = [None if ids is None else dict(zip(("prompt_ids", "prompt_mask"), ids, strict=True)) for ids in negatives]
        condition = dict(zip(("prompt_ids", "prompt_mask"), positive, strict=True))
        longest = max(one["prompt_ids"].shape[1] for one in (condition, *every) if one is not None)
        # On the device "meta" the layout is computed without memory: the grid may be far too large for the model.
        image = torch.empty(1, *call.grid, dtype=torch.long, device="meta")
        call.check_sequence_length(longest + self.lay_out(image, image.bool())[0].shape[1], self.max_length)
        return condition, *every

    def predict(
        self,
        tokens: torch.Tensor,
        prompt_ids: torch.Tensor,
        prompt_mask: torch.Tensor,
        where: torch.Tensor | None = None,
        call: ImageCall | None = None,
    ) -> torch.Tensor:
        """Logits of the image codes, without guidance.

        No tensor with a column for every word of the vocabulary is made.

        Args:
            tokens: (R, h, w) long, image codes, or the scheduler's mask id.
            prompt_ids, prompt_mask: (R, P) each, from `encode_prompt`.
            where: (R, h, w) bool, the positions whose logits are wanted; by default those that the call wants, the masked ones.
            call: The call.

        Returns:
            (M, V) for the M positions of `where`, in row-major order.
        """
        if where is None:
            where = tokens == self.scheduler.config.mask_token_id if call is None else call.wanted(tokens)
        sequence, wanted = self.lay_out(self._image_ids(tokens), where)
        return predict_after_prompts(self.transformer, prompt_ids, prompt_mask, sequence, wanted, self._image_range)

    def positions(self, tokens: torch.Tensor, condition: Condition) -> tuple[torch.Tensor, torch.Tensor]:
        """Which positions of the sequence are none of padding, and which are image tokens, (R, P) each, for states (R, h, w)."""
        prompt_mask = condition["prompt_mask"]
        _, image = self.lay_out(tokens, torch.ones_like(tokens, dtype=torch.bool))
        return torch.cat([prompt_mask, torch.ones_like(image)], dim=1), torch.cat([torch.zeros_like(prompt_mask), image], dim=1)

    def run_rows(self, tokens: torch.Tensor, condition: Condition, where: torch.Tensor, rows: PartialRows) -> torch.Tensor:
        """Logits (M, V) of states (R, h, w) at the M positions of `where` (R, P), of the sequence."""
        sequence, _ = self.lay_out(self._image_ids(tokens), torch.ones_like(tokens, dtype=torch.bool))
        ids = torch.cat([condition["prompt_ids"], sequence], dim=1)
        real, _ = self.positions(tokens, condition)
        return run_llama(self.transformer, ids, real, where, self._image_range, rows)

    def _image_ids(self, tokens: torch.Tensor) -> torch.Tensor:
        """Image tokens as ids of the vocabulary."""
        masked = tokens == self.scheduler.config.mask_token_id
        return torch.where(masked, self.transformer.config.mask_token_id, tokens + self.image_token_offset)

    @property
    def _image_range(self) -> tuple[int, int]:
        return self.image_token_offset, self.image_token_offset + self.codebook_size
