"""CLIP models as transformers' `CLIPModel`, in its own format or in open_clip's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from transformers import CLIPConfig, CLIPModel

from ..files import read_json
from .configs import check_sizes, stock_config, stock_settings
from .source import ModelSource
from .weights import Checkpoint, Combination, CombinedCheckpoint, find_weights, weight_names

# Of the image and the text half of ViT-H-14; the shapes of a checkpoint do not tell.
_HEADS = 16

KEY_MAPPING = {
    r"^visual\.(class_embedding)$": r"vision_model.embeddings.\1",
    r"^visual\.positional_embedding$": "vision_model.embeddings.position_embedding.weight",
    r"^visual\.conv1\.": "vision_model.embeddings.patch_embedding.",
    r"^visual\.ln_pre\.": "vision_model.pre_layrnorm.",
    r"^visual\.ln_post\.": "vision_model.post_layernorm.",
    r"^visual\.proj$": "visual_projection.weight",
    r"^visual\.transformer\.resblocks\.": "vision_model.encoder.layers.",
    r"^transformer\.resblocks\.": "text_model.encoder.layers.",
    r"^positional_embedding$": "text_model.embeddings.position_embedding.weight",
    r"^token_embedding\.": "text_model.embeddings.token_embedding.",
    r"^ln_final\.": "text_model.final_layer_norm.",
    r"^text_projection$": "text_projection.weight",
    r"\.ln_([12])\.": r".layer_norm\1.",
    r"\.attn\.": ".self_attn.",
    r"\.mlp\.c_fc\.": ".mlp.fc1.",
    r"\.mlp\.c_proj\.": ".mlp.fc2.",
}
"""`CLIPModel`'s names for the parts of the checkpoint's keys."""


def convert_tensor(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The value in `CLIPModel`, under its `name` there, of a tensor of the checkpoint: projections are linear layers there."""
    return tensor.T if name in ("visual_projection.weight", "text_projection.weight") else tensor


def config_from_state_dict(shapes: Mapping[str, tuple[int, ...]], num_attention_heads: int = _HEADS) -> CLIPConfig:
    """The configuration of a checkpoint from the names and shapes of its tensors.

    Args:
        num_attention_heads: Of both halves, which shapes do not tell.

    Raises:
        ValueError: If a tensor is missing or has another number of dimensions.
    """
    dimensions = {
        "visual.conv1.weight": 4,
        "visual.positional_embedding": 2,
        "visual.transformer.resblocks.0.mlp.c_fc.weight": 2,
        "token_embedding.weight": 2,
        "positional_embedding": 2,
        "transformer.resblocks.0.mlp.c_fc.weight": 2,
        "text_projection": 2,
    }
    missing = [key for key, count in dimensions.items() if len(shapes.get(key, ())) != count]
    if missing:
        raise ValueError(f"these are no weights of a CLIP in open_clip's format: {missing[0]} is missing or has another shape")

    def half(prefix: str) -> dict[str, int]:
        layers = {key.split(".resblocks.")[1].split(".")[0] for key in shapes if key.startswith(f"{prefix}.resblocks.")}
        intermediate, hidden = shapes[f"{prefix}.resblocks.0.mlp.c_fc.weight"]
        sizes = {"hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": len(layers)}
        return {**sizes, "num_attention_heads": num_attention_heads, "projection_dim": shapes["text_projection"][1]}

    vocabulary, patch = shapes["token_embedding.weight"][0], shapes["visual.conv1.weight"][-1]
    text = {"vocab_size": vocabulary, "max_position_embeddings": shapes["positional_embedding"][0], "hidden_act": "gelu"}
    # The last two tokens begin and end a text; its features are those at its end.
    text |= {"bos_token_id": vocabulary - 2, "eos_token_id": vocabulary - 1, "pad_token_id": vocabulary - 1}
    side = math.isqrt(shapes["visual.positional_embedding"][0] - 1)
    vision = {"image_size": patch * side, "patch_size": patch, "hidden_act": "gelu"}
    return CLIPConfig(
        text_config={**half("transformer"), **text},
        vision_config={**half("visual.transformer"), **vision},
        projection_dim=shapes["text_projection"][1],
    )


def open_clip_model(folder: Path) -> ModelSource:
    """Opens a CLIP in a folder in transformers' format.

    Raises:
        ValueError: If the configuration or the weights are missing or damaged.
    """
    file = folder / "config.json"
    settings = stock_settings(read_json(file))
    weights = find_weights(folder, weight_names("model"))
    check_sizes(settings, weights, file)
    config = stock_config(CLIPConfig, settings, file)
    unused = r".*embeddings\.position_ids$"  # ids that older versions of transformers stored
    return ModelSource(weights, lambda: CLIPModel(config), _probe, unused_keys=unused)


def _with_parts(checkpoint: Checkpoint) -> Checkpoint:
    """A checkpoint in which torch's fused weights of query, key and value (`in_proj_weight`, `in_proj_bias`) are three.

    They have the keys `q_proj.weight`, `k_proj.weight` and so on.
    """
    parts = {
        key.replace(".in_proj_", f".{name}_proj."): Combination((key,), partial(_third, part))
        for key in checkpoint.shapes
        if ".in_proj_" in key
        for part, name in enumerate("qkv")
    }
    return CombinedCheckpoint(checkpoint, parts)


def _third(part: int, stored: list[torch.Tensor]) -> torch.Tensor:
    (fused,) = stored
    return fused.chunk(3)[part]


def open_open_clip(file: Path) -> ModelSource:
    """Opens the weights of a ViT-H-14 in open_clip's format, with the keys at the top or under "state_dict".

    Raises:
        ValueError: If the file holds another model, or is damaged.
    """
    checkpoint = _with_parts(Checkpoint([file], ("state_dict",)))
    try:
        config = config_from_state_dict(checkpoint.shapes)
    except ValueError as error:
        raise ValueError(f"{file}: {error}.") from None
    return ModelSource(checkpoint, lambda: CLIPModel(config), _probe, KEY_MAPPING, convert_tensor=convert_tensor)


@torch.no_grad()
def _probe(model: CLIPModel) -> torch.Tensor:
    size = model.config.vision_config.image_size
    pixels = torch.linspace(-1, 1, 3 * size * size).view(1, 3, size, size)
    ids = torch.tensor([[model.config.text_config.bos_token_id, 0, model.config.text_config.eos_token_id]])
    return model(input_ids=ids, pixel_values=pixels).logits_per_image
