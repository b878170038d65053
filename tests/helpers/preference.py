"""Tiny networks that judge images, in the files in which they are published; see golden/README.md."""

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

from helpers.amused import make_tokenizer

GOLDEN = Path(__file__).parents[1] / "golden" / "preference_tiny"
SCORES = {"pick_score": "pick_score", "hps_v2": "hps", "image_reward": "image_reward"}
"""The metrics, and their names in the stored figures."""


def stored() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    return load_file(GOLDEN.with_suffix(".safetensors")), json.loads(GOLDEN.with_suffix(".json").read_text())


def stored_part(prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): value for name, value in stored()[0].items() if name.startswith(prefix)}


def save_preference_models(folder: Path) -> dict[str, str]:
    """Writes all of them, and returns where, by the settings of `MeasureSettings`."""
    pick, processor, bert = (folder / name for name in ("pick", "processor", "bert"))
    for made in (pick, processor, bert):
        made.mkdir(parents=True)
    tokenizer = make_tokenizer()
    ends = {f"{token}_token_id": getattr(tokenizer, f"{token}_token_id") for token in ("eos", "bos", "pad")}
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_act": "gelu"}
    transformers.CLIPConfig(
        text_config={**sizes, **ends, "vocab_size": len(tokenizer), "max_position_embeddings": 16},
        vision_config={**sizes, "image_size": 28, "patch_size": 14},
        projection_dim=16,
    ).save_pretrained(pick)
    save_file(stored_part("pick_score."), pick / "model.safetensors")
    tokenizer.save_pretrained(processor)
    size = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    transformers.CLIPImageProcessorPil(**size).save_pretrained(processor)
    (processor / "config.json").write_text(json.dumps({"model_type": "clip"}))
    transformers.BertTokenizer(vocab={word: i for i, word in enumerate(stored()[1]["vocabulary"])}).save_pretrained(bert)
    torch.save({"epoch": 3, "state_dict": stored_part("hps.")}, folder / "HPS_v2_compressed.pt")
    save_file(stored_part("hps."), folder / "HPS_v2.1_compressed.safetensors")
    torch.save(stored_part("image_reward."), folder / "ImageReward.pt")
    return {
        "pick_score_weights": str(pick),
        "hps_v2_weights": str(folder / "HPS_v2_compressed.pt"),
        "hps_v2_1_weights": str(folder),  # a folder that holds the file
        "image_reward_weights": str(folder / "ImageReward.pt"),
        "clip_h_processor": str(processor),
        "bert_tokenizer": str(bert),
    }


def preference_flags(settings: dict[str, str]) -> list[str]:
    """The settings as flags of the command line."""
    return [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", value)]
