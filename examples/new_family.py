"""A new family of image models: a network, and the pipeline that decodes it.

    python examples/new_family.py

This is the worked example of CONTRIBUTING.md. In the package the network would be `models/toy_transformer.py`, the pipeline
`pipeline_infogain_toy.py`, and the class would be added to `IMAGE_PIPELINES` in `loading.py` and to `__init__.py`. The network is
tiny and its weights are random, so the images are noise; but every rule and search of the package decodes them.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin, VQModel
from diffusers.configuration_utils import register_to_config

from diffusers_infogain import InfoGainScheduler
from diffusers_infogain.checks import check_choice
from diffusers_infogain.image_call import Canvas, Condition, ImageCall
from diffusers_infogain.image_pipeline import InfoGainImagePipeline

WORDS = ("nothing", "stripes", "dots", "waves")
"""The prompts of the toy; guidance steers away from the first."""


class ToyTransformer2DModel(ModelMixin, ConfigMixin):
    """Tokens (R, h, w) and a word (R,) to logits (R, h * w, codebook_size). The id after the codes is the mask."""

    @register_to_config
    def __init__(self, codebook_size: int = 16, vocab_size: int = 17, sample_size: int = 8, hidden_size: int = 32):
        super().__init__()
        self.tokens = torch.nn.Embedding(vocab_size, hidden_size)
        self.positions = torch.nn.Embedding(sample_size**2, hidden_size)
        self.words = torch.nn.Embedding(len(WORDS), hidden_size)
        self.layer = torch.nn.TransformerEncoderLayer(hidden_size, nhead=4, dim_feedforward=64, dropout=0, batch_first=True)
        self.head = torch.nn.Linear(hidden_size, codebook_size)

    def forward(self, tokens: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        hidden = self.tokens(tokens.flatten(1)) + self.positions.weight + self.words(words)[:, None]
        return self.head(self.layer(hidden))


class ToyPipeline(InfoGainImagePipeline):
    """Word-to-image generation with `ToyTransformer2DModel`: 6 steps and a guidance of 3 by default."""

    families = ("Toy",)
    model_cpu_offload_seq = "transformer->vqvae"
    default_num_inference_steps = 6
    family_guidance_scale = 3.0

    # diffusers reads off the constructor which components there are, and of which classes.
    def __init__(
        self,
        vqvae: VQModel | None,
        transformer: ToyTransformer2DModel | None,
        scheduler: InfoGainScheduler | None,
        default_guidance_scale: float | None = None,
    ):
        super().__init__()
        self.register_family(scheduler, default_guidance_scale, vqvae=vqvae, transformer=transformer)

    def canvas(self) -> Canvas:
        """The image tokens of the model; it has position embeddings for one size only."""
        config = self.transformer.config
        return Canvas(config.codebook_size, config.vocab_size, config.sample_size, only_side=True)

    def encode(self, call: ImageCall, prompt: Any, negative_prompt: Any) -> tuple[Condition, Condition]:
        """What the images show, and what guidance steers away from: tensors by argument of `predict`, with an entry per image."""
        words = self.word_ids("prompt", call.per_image(prompt))
        negative = self.word_ids("negative_prompt", call.per_image(negative_prompt or WORDS[0]))
        return {"words": words}, {"words": negative}

    def word_ids(self, name: str, words: list[str]) -> torch.Tensor:
        """The ids of words (B,)."""
        for word in words:
            check_choice(name, word, WORDS)
        return torch.tensor([WORDS.index(word) for word in words], device=self._execution_device)

    def predict(self, tokens: torch.Tensor, words: torch.Tensor, call: ImageCall) -> torch.Tensor:
        """Logits (R, h * w, codebook_size) of states (R, h, w); the base class guides them."""
        return self.transformer(tokens, words)


def make_pipeline(**settings: Any) -> ToyPipeline:
    """A pipeline with random weights, always the same; `settings` are the scheduler's."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vqvae = VQModel(
            block_out_channels=(8, 8, 8),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            latent_channels=8,
            lookup_from_codebook=True,
            norm_num_groups=4,
            num_vq_embeddings=16,
        )
        transformer = ToyTransformer2DModel()
    return ToyPipeline(vqvae.eval(), transformer.eval(), InfoGainScheduler(mask_token_id=16, **settings))


def main() -> None:
    """Decodes an image in three ways: one run with lookahead, a beam search, the best of three runs."""
    pipe = make_pipeline()
    for search in ({}, {"num_beams": 2}, {"num_runs": 3}):
        output = pipe("stripes", negative_prompt="dots", generator=torch.Generator().manual_seed(0), **search)
        print(f"{search or 'one run'}: {output.images[0].size[0]} pixels wide, {output.trace}")


if __name__ == "__main__":
    main()
