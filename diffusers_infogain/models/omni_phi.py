"""Show-o's language model (arXiv 2408.12528) as transformers' Phi with omni-attention: causal for text, full for images."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

# Keep the name `PreTrainedModel` in this module: diffusers looks for it here to find out how to load a component.
from transformers import PhiConfig, PhiForCausalLM, PreTrainedModel  # noqa: F401

from ..checkpoints.configs import check_sizes, require_fields, stock_config, stock_settings
from ..checkpoints.errors import one_sentence
from ..checkpoints.source import ModelSource
from ..checkpoints.weights import find_weights
from ..checks import is_integer, shown
from ..files import read_json
from .llada import VisibleTokensMixin

WEIGHT_NAMES = (
    "pytorch_model.safetensors",
    "model.safetensors",
    "diffusion_pytorch_model.safetensors",
    "pytorch_model.bin",
    "diffusion_pytorch_model.bin",
)
SPECIAL_TOKENS = ("pad", "soi", "eoi", "sov", "eov", "t2i", "mmu", "t2v", "v2v", "lvg")
"""The tokens that Show-o adds behind the vocabulary of Phi's tokenizer, in their order. Image codes follow, then the mask."""

_SIZES = ("vocab_size", "llm_vocab_size", "codebook_size", "num_vq_tokens")


class OmniPhi(VisibleTokensMixin, PhiForCausalLM):
    """Show-o's network: transformers' Phi, in which text is causal, and the tokens of an image see everything.

    Its configuration has `image_start_token_id` and `image_end_token_id`; they and what stands between them is an image.
    `from_pretrained` reads what `convert` or `save_pretrained` wrote; `open_omni_phi` reads Show-o's own format.
    """

    def visible(self, input_ids: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        """Which tokens each token sees, (B, L, L) bool: text those before it, images all; only itself sees padding.

        Args:
            input_ids: (B, L) long.
            real: (B, L) bool, False at padding.
        """
        start, end = input_ids == self.config.image_start_token_id, input_ids == self.config.image_end_token_id
        image = (start.cumsum(-1) > end.cumsum(-1)) | end
        before = torch.ones(input_ids.shape[1], input_ids.shape[1], dtype=torch.bool, device=input_ids.device).tril()
        # Padding sees itself: a query that sees no key would give NaN.
        itself = torch.eye(input_ids.shape[1], dtype=torch.bool, device=input_ids.device)
        return (image[:, :, None] | before) & real[:, None, :] | itself


def check_layout(config: Mapping[str, Any], file: Path) -> None:
    """Raises a ValueError unless the vocabulary of Show-o's config.json is words, special tokens, image codes and the mask."""
    for name in _SIZES:
        if not is_integer(config.get(name)) or config[name] < 1:
            raise ValueError(f"{file}: `{name}` must be a positive integer, got {shown(config.get(name))}.")
    if not isinstance(config.get("w_clip_vit"), bool):
        raise ValueError(f"{file}: `w_clip_vit` must be true or false, got {shown(config.get('w_clip_vit'))}.")
    require_fields(config, {"num_new_special_tokens": len(SPECIAL_TOKENS), "mask_token_id": config["vocab_size"] - 1}, file)
    words, special, codes = config["llm_vocab_size"], len(SPECIAL_TOKENS), config["codebook_size"]
    if config["vocab_size"] != words + special + codes + 1:
        raise ValueError(
            f"{file}: `vocab_size` must be {words + special + codes + 1}: `llm_vocab_size` {words}, {special} special tokens, "
            f"`codebook_size` {codes} and the mask, got {config['vocab_size']}."
        )


def special_token_id(config: Mapping[str, Any], name: str) -> int:
    """The id of one of `SPECIAL_TOKENS`, by Show-o's config.json."""
    return int(config["llm_vocab_size"]) + SPECIAL_TOKENS.index(name)


def omni_phi_config(config: Mapping[str, Any], phi: Mapping[str, Any], phi_file: Path) -> PhiConfig:
    """The configuration of the network.

    Args:
        config: Show-o's config.json, as `check_layout` wants it.
        phi, phi_file: The config.json of the language model that it began as, and where it is.

    Raises:
        ValueError: If that is no Phi.
    """
    if phi.get("model_type") != "phi":
        raise ValueError(f"{phi_file}: `model_type` must be 'phi', got {shown(phi.get('model_type'))}.")
    stock = stock_settings({name: value for name, value in phi.items() if name not in ("architectures", "dtype", "torch_dtype")})
    own = {
        "vocab_size": config["vocab_size"],
        "qk_layernorm": True,  # Show-o has it, Phi-1.5 has not
        "tie_word_embeddings": False,
        "use_cache": False,
        "is_causal": False,
        "mask_token_id": config["vocab_size"] - 1,
        "image_start_token_id": special_token_id(config, "soi"),
        "image_end_token_id": special_token_id(config, "eoi"),
    }
    return stock_config(PhiConfig, {**stock, **own}, phi_file)


def open_omni_phi(folder: Path, phi_folder: Path) -> ModelSource:
    """Opens the network of a repository in Show-o's format.

    Args:
        folder: Of the repository.
        phi_folder: Of the language model that it began as, of which config.json is read.

    Raises:
        ValueError: As in `check_layout`, `omni_phi_config` and `find_weights`.
    """
    file, phi_file = folder / "config.json", phi_folder / "config.json"
    settings, phi = read_json(file), read_json(phi_file)
    check_layout(settings, file)
    weights = find_weights(folder, WEIGHT_NAMES)
    check_sizes(settings, weights, file)
    check_sizes(phi, weights, phi_file)
    config = omni_phi_config(settings, phi, phi_file)
    # With CLIP's features for questions about images, which go through a projector. Images are generated without it.
    unused = r"mm_projector\.[02]\.(weight|bias)$" if settings["w_clip_vit"] else "(?!)"

    def build() -> OmniPhi:
        with one_sentence(f"{phi_file} makes no OmniPhi"):
            return OmniPhi(config)

    return ModelSource(weights, build, _probe, {r"^showo\.": ""}, unused)


@torch.no_grad()
def _probe(model: OmniPhi) -> torch.Tensor:
    tokens = torch.arange(8)[None] * 11 % model.config.vocab_size
    tokens[:, 3] = model.config.image_start_token_id
    return model(tokens, where=tokens % 3 == 0)
