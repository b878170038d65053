"""Text to image with MaskGen's models of discrete tokens, decoded by `InfoGainScheduler`."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from typing import Any

import torch
from diffusers.utils import logging
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from .checkpoints.published import PublishedPipeline
from .checkpoints.repository import CONFIG, HubArguments, Repository, local_folder
from .checkpoints.saved import load_tokenizer
from .checkpoints.stock import open_clip_text_encoder
from .checkpoints.weights import find_weights
from .checks import LARGEST_NUMBER, check_number, prompt_list
from .components import check_components, in_float32, tokenize
from .files import read_json
from .image_call import Condition, ImageCall
from .image_pipeline_line import LineImagePipeline
from .models.maskgen_transformer import MaskGenTransformer, open_maskgen_transformer
from .models.titok_published import WEIGHT_NAMES, open_tokenizer, section
from .models.titok_tokenizer import TiTokTokenizer
from .scheduling_infogain import InfoGainScheduler

logger = logging.get_logger("diffusers." + __name__)

VQ_REPOSITORY = "turkeyju/tokenizer_tatitok_bl128_vq"
"""Where MaskGen's image tokenizer is published."""

TEXT_REPOSITORY = "openai/clip-vit-large-patch14-336"
"""Where the text encoder is, which MaskGen's authors take from open_clip as "ViT-L-14-336"."""


class InfoGainMaskGenPipeline(LineImagePipeline):
    r"""Text-to-image generation with MaskGen (arXiv 2501.07730), discrete tokens, decoded by information gain or any other rule.

    An image of 256 x 256 pixels is a line of 128 tokens, none of which has a place in it. The image tokenizer, TA-TiTok, reads
    the prompt once more where it turns tokens into pixels. MaskGen's own sampler is
    `InfoGainScheduler.from_config(pipe.scheduler.config, **PRESETS["maskgen"])`.

    Guidance is logits = (1 + w) · cond - w · uncond; 0 or less switches it off. By default w grows with the steps, as published,
    from 1 to 12 ("maskgen_cosine"). Calls take 16 steps by default.

    Args:
        vqvae: Decodes tokens into pixels, given the prompt.
        tokenizer: Tokenizer of the text encoder. Prompts are padded with the id 0, as in open_clip.
        text_encoder: CLIP ViT-L/14, whose pooled embeddings and penultimate hidden states condition the transformer, and whose
            last hidden states the image tokenizer reads.
        transformer: Predicts the tokens.
        scheduler: Chooses the tokens to decode in each step, and their values.
        aesthetic_score: That all images are conditioned on; published is 6.5.
        default_guidance_scale, default_guidance_schedule, default_num_inference_steps: Of calls that give none; by default
            12, "maskgen_cosine" and 16.

    Raises:
        ValueError: If `scheduler` is neither an `InfoGainScheduler` nor an `AmusedScheduler`, or if `vqvae` has other codes than
            `transformer`.
    """

    families = ("MaskGen",)
    repository_options = ("vqvae", "vqvae_revision", "text_encoder")
    model_cpu_offload_seq = "text_encoder->transformer->vqvae"
    family_num_inference_steps = 16
    family_guidance_scale = 12.0
    family_guidance_schedule = "maskgen_cosine"
    guidance_offset = 1

    vqvae: TiTokTokenizer
    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModelWithProjection
    transformer: MaskGenTransformer
    scheduler: InfoGainScheduler

    def __init__(
        self,
        vqvae: TiTokTokenizer | None,
        tokenizer: CLIPTokenizer | None,
        text_encoder: CLIPTextModelWithProjection | None,
        transformer: MaskGenTransformer | None,
        scheduler: InfoGainScheduler | None,
        aesthetic_score: float = 6.5,
        default_guidance_scale: float | None = None,
        default_guidance_schedule: str | None = None,
        default_num_inference_steps: int | None = None,
    ):
        super().__init__()
        check_number("aesthetic_score", aesthetic_score, -LARGEST_NUMBER)
        self.register_to_config(aesthetic_score=aesthetic_score)
        self.register_family(
            scheduler,
            default_guidance_scale,
            vqvae=vqvae,
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            transformer=transformer,
        )
        self.register_defaults(default_guidance_schedule, default_num_inference_steps)
        self.check_codes(vqvae, transformer)

    @classmethod
    def is_published(cls, repository: Repository) -> bool:
        """Whether its config.json is a generator's."""
        model = (repository.config or {}).get("model")
        return isinstance(model, Mapping) and isinstance(model.get("maskgen"), Mapping)

    @classmethod
    def open_published(
        cls,
        repository: str | os.PathLike[str],
        *,
        vqvae: str | os.PathLike[str] = VQ_REPOSITORY,
        vqvae_revision: str | None = None,
        text_encoder: str | os.PathLike[str] = TEXT_REPOSITORY,
        without: Collection[str] = (),
        **hub: Any,
    ) -> PublishedPipeline:
        """The published weights, opened to be loaded or converted.

        Args:
            repository: Folder or Hub id of the generator, such as "turkeyju/generator_maskgen_vq_xl".
            vqvae: Folder or Hub id of the image tokenizer, which is published apart.
            vqvae_revision: Of its Hub repository.
            text_encoder: Folder or Hub id of CLIP ViT-L/14 at 336 pixels, in transformers' format, with its tokenizer.
            without: Models that are not opened, since others take their place or none is wanted.
            hub: `revision`, `cache_dir`, `token` and `local_files_only`, as in `huggingface_hub.snapshot_download`.

        Raises:
            ValueError: If a repository is of another family, or has no weights.
        """
        arguments = HubArguments(**hub)
        folder = local_folder(repository, [CONFIG, *WEIGHT_NAMES], arguments)
        config, where = read_json(folder / CONFIG), folder / CONFIG
        models = {}
        if "transformer" not in without:
            models["transformer"] = open_maskgen_transformer(find_weights(folder, WEIGHT_NAMES), config, where)
        if "vqvae" not in without:
            place = local_folder(vqvae, [CONFIG, *WEIGHT_NAMES], HubArguments(**{**hub, "revision": vqvae_revision}))
            models["vqvae"] = open_tokenizer(find_weights(place, WEIGHT_NAMES), read_json(place / CONFIG), place / CONFIG)
        words: dict[str, Any] = {}
        if not {"text_encoder", "tokenizer"} <= set(without):
            clip = local_folder(text_encoder, ["*.json", "*.txt", "model.safetensors"], HubArguments(**{**hub, "revision": None}))
            if "text_encoder" not in without:
                models["text_encoder"] = open_clip_text_encoder(clip)
            words = {"tokenizer": load_tokenizer(CLIPTokenizer, clip)}
        maskgen = section(config, "model.maskgen", where)
        own = {
            "aesthetic_score": maskgen.get("sample_aesthetic_score", 6.0),
            "default_guidance_scale": maskgen.get("cfg"),
            "default_num_inference_steps": maskgen.get("num_iter"),
        }
        codebook_size = section(config, "model.vq_model", where).get("codebook_size")
        return PublishedPipeline(cls, models, {**words, "scheduler": InfoGainScheduler(codebook_size), **own})

    @torch.no_grad()
    def encode_prompt(self, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What the text encoder says of prompts.

        Prompts that are too long are cut as open_clip does, with a warning.

        Returns:
            The penultimate hidden states (B, S, D), the pooled and projected embeddings (B, D), and the last hidden states (B, S,
            D), which only the image tokenizer reads.
        """
        check_components(self, "tokenizer", "text_encoder")
        limit = self.text_encoder.config.max_position_embeddings
        rows = []
        for text in prompt_list("prompts", prompts):
            ids = tokenize(self.tokenizer, text, verbose=False).input_ids
            if len(ids) > limit:
                logger.warning(f"A prompt of {len(ids)} tokens was cut to the {limit} that the text encoder takes: {text!r}.")
                ids = [*ids[: limit - 1], ids[-1]]
            rows.append([*ids, *(limit - len(ids)) * [0]])
        outputs = self.text_encoder(
            torch.tensor(rows, device=self.device_of("text_encoder")), return_dict=True, output_hidden_states=True
        )
        return outputs.hidden_states[-2], outputs.text_embeds, outputs.last_hidden_state

    def encode(self, call: ImageCall, prompt: Any, negative_prompt: Any) -> tuple[Condition, Condition | None]:
        """The embeddings of the prompts, and of the negative prompts with guidance, with the aesthetic score."""
        condition, text = self._encode(call, prompt)
        call.decoding = {"text": text}
        return condition, self._encode(call, "" if negative_prompt is None else negative_prompt)[0] if call.guided else None

    def _encode(self, call: ImageCall, prompt: Any) -> tuple[Condition, torch.Tensor]:
        texts = [prompt] if isinstance(prompt, str) else prompt
        index = torch.tensor(call.per_image(list(range(len(texts)))))
        hidden, pooled, last = (value[index.to(value.device)] for value in self.encode_prompt(texts))
        kind = {"device": call.device, "dtype": self.transformer.dtype}
        scores = torch.full((len(index),), float(self.config.aesthetic_score), device=call.device)
        condition = {"encoder_hidden_states": hidden.to(**kind), "pooled_text_emb": pooled.to(**kind), "aesthetic_scores": scores}
        return condition, last

    def predict(self, tokens: torch.Tensor, call: ImageCall, **condition: torch.Tensor) -> torch.Tensor:
        """Logits (M, V) of tokens (R, 1, N) where the call wants them, without guidance."""
        return self.transformer(tokens.flatten(1), **condition, where=call.wanted(tokens).flatten(1))

    def decode_tokens(
        self, tokens: torch.Tensor, seen: torch.Tensor | None = None, text: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Pixels (B, 3, H, W) of tokens (B, N), where they are `seen` (B, N), given the last states (B, S, D) of a text."""
        return in_float32(self.vqvae).decode(tokens, None if text is None else text.float().to(tokens.device), seen)
