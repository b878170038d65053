"""The network of ImageReward ("ImageReward: Learning and Evaluating Human Preferences for Text-to-Image Generation", arXiv
2304.05977): BLIP's text encoder reads the prompt and looks at the image, and linear layers make one number of that.

transformers has both halves of BLIP. The published file ImageReward.pt has the tensors under BLIP's own names.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import BlipTextConfig, BlipVisionConfig, BlipVisionModel
from transformers.models.blip.modeling_blip_text import BlipTextModel

from ..checkpoints.source import ModelSource
from ..checkpoints.weights import Checkpoint

MEAN = 0.16717362830052426
STANDARD_DEVIATION = 1.0333394966054072
"""Of the linear layers' output on the authors' data: rewards have about the mean 0 and the standard deviation 1 there."""
MAX_LENGTH = 35
"""Tokens of a prompt that are read, the first and the last one included."""
_VISION_HEADS = 16
_TEXT_HEADS = 12
"""Attention heads of the published model, which shapes do not tell."""

KEY_MAPPING = {
    r"^blip\.visual_encoder\.": "vision_model.",
    r"^blip\.text_encoder\.": "text_model.",
    r"^mlp\.layers\.": "mlp.",
    r"^vision_model\.cls_token$": "vision_model.embeddings.class_embedding",
    r"^vision_model\.pos_embed$": "vision_model.embeddings.position_embedding",
    r"^vision_model\.patch_embed\.proj\.": "vision_model.embeddings.patch_embedding.",
    r"^vision_model\.norm\.": "vision_model.post_layernorm.",
    r"^vision_model\.blocks\.": "vision_model.encoder.layers.",
    r"(layers\.\d+)\.attn\.proj\.": r"\1.self_attn.projection.",
    r"(layers\.\d+)\.attn\.qkv\.": r"\1.self_attn.qkv.",
    r"(layers\.\d+)\.norm([12])\.": r"\1.layer_norm\2.",
}
"""`ImageReward`'s names for the parts of the checkpoint's keys."""
UNUSED_KEYS = r"blip\.|text_model\.embeddings\.position_ids$"
"""What else BLIP was trained with, and ids that older versions of transformers stored."""


class ImageReward(nn.Module):
    """Rewards of images by their prompts.

    Args:
        vision: Of BLIP's image encoder.
        text: Of BLIP's text encoder with cross-attention.
        layers: Inputs and outputs of the linear layers by the index that they have in the published file. Between them there is
            no nonlinearity.
    """

    def __init__(self, vision: BlipVisionConfig, text: BlipTextConfig, layers: Mapping[str, tuple[int, int]]):
        super().__init__()
        self.vision_model = BlipVisionModel(vision)
        self.text_model = BlipTextModel(text, add_pooling_layer=False)
        self.mlp = nn.Sequential(OrderedDict((index, nn.Linear(*sizes)) for index, sizes in layers.items()))

    def forward(self, pixel_values: torch.Tensor, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Rewards (B,) of normalised pixels (B, 3, S, S) by token ids (B, T), whose padding is 0 in the mask (B, T)."""
        image = self.vision_model(pixel_values=pixel_values).last_hidden_state
        text = self.text_model(input_ids=input_ids, attention_mask=attention_mask, encoder_hidden_states=image)
        return (self.mlp(text.last_hidden_state[:, 0])[:, 0] - MEAN) / STANDARD_DEVIATION


def _settings(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The arguments of `ImageReward` for a checkpoint, from the names and shapes of its tensors.

    Raises:
        ValueError: If a tensor is missing or has another number of dimensions.
    """
    vision, text = "blip.visual_encoder.", "blip.text_encoder."
    dimensions = {
        f"{vision}pos_embed": 3,
        f"{vision}patch_embed.proj.weight": 4,
        f"{vision}blocks.0.mlp.fc1.weight": 2,
        f"{text}embeddings.word_embeddings.weight": 2,
        f"{text}embeddings.position_embeddings.weight": 2,
        f"{text}encoder.layer.0.intermediate.dense.weight": 2,
        f"{text}encoder.layer.0.crossattention.self.key.weight": 2,
        "mlp.layers.0.weight": 2,
    }
    missing = [key for key, count in dimensions.items() if len(shapes.get(key, ())) != count]
    if missing:
        raise ValueError(f"these are no weights of ImageReward: {missing[0]} is missing or has another shape")

    def layers(prefix: str) -> int:
        return len({key.removeprefix(prefix).split(".")[0] for key in shapes if key.startswith(prefix)})

    patch = shapes[f"{vision}patch_embed.proj.weight"][-1]
    vision_sizes, text_sizes = (
        shapes[f"{vision}blocks.0.mlp.fc1.weight"],
        shapes[f"{text}encoder.layer.0.intermediate.dense.weight"],
    )
    vocabulary = shapes[f"{text}embeddings.word_embeddings.weight"][0]
    linear = {key.split(".")[2]: shape[::-1] for key, shape in shapes.items() if key.startswith("mlp.") and len(shape) == 2}
    return {
        "vision": BlipVisionConfig(
            hidden_size=vision_sizes[1],
            intermediate_size=vision_sizes[0],
            num_hidden_layers=layers(f"{vision}blocks."),
            num_attention_heads=_VISION_HEADS,
            image_size=patch * math.isqrt(shapes[f"{vision}pos_embed"][1] - 1),
            patch_size=patch,
            hidden_act="gelu",
            layer_norm_eps=1e-6,
        ),
        "text": BlipTextConfig(
            hidden_size=text_sizes[1],
            intermediate_size=text_sizes[0],
            num_hidden_layers=layers(f"{text}encoder.layer."),
            num_attention_heads=_TEXT_HEADS,
            encoder_hidden_size=shapes[f"{text}encoder.layer.0.crossattention.self.key.weight"][1],
            vocab_size=vocabulary,
            max_position_embeddings=shapes[f"{text}embeddings.position_embeddings.weight"][0],
            hidden_act="gelu",
            layer_norm_eps=1e-12,
            bos_token_id=None,
            eos_token_id=None,
            sep_token_id=None,
            pad_token_id=0,
        ),
        "layers": dict(sorted(linear.items(), key=lambda item: int(item[0]) if item[0].isdecimal() else -1)),
    }


def open_image_reward(file: Path) -> ModelSource:
    """Opens the published weights.

    Raises:
        ValueError: If the file holds another model, or is damaged.
    """
    checkpoint = Checkpoint([file])
    try:
        settings = _settings(checkpoint.shapes)
    except ValueError as error:
        raise ValueError(f"{file}: {error}.") from None
    return ModelSource(checkpoint, lambda: ImageReward(**settings), _probe, KEY_MAPPING, UNUSED_KEYS)


@torch.no_grad()
def _probe(model: ImageReward) -> torch.Tensor:
    size = model.vision_model.config.image_size
    pixels = torch.linspace(-1, 1, 3 * size * size).view(1, 3, size, size)
    return model(pixels, torch.arange(4)[None], torch.ones(1, 4, dtype=torch.long))
