"""Writes a small random repository laid out as the public ones of Meissonic and Monetico."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from diffusers_infogain.models.meissonic_transformer import MeissonicTransformer2DModel
from helpers.amused import CODEBOOK_SIZE, make_components

# The last id of the vocabulary is the mask.
VOCAB_SIZE = CODEBOOK_SIZE + 2
DIFFUSERS_VERSION = "0.30.2"


def write_json(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")


def write_code_that_nobody_may_run(path: Path) -> None:
    path.write_text('raise RuntimeError("code of a repository was executed")\n')


def write_meissonic_repository(folder: Path, downsample: bool) -> Path:
    """A repository of 24 codes and mask id 25; `downsample=True` as Meissonic's, False as Monetico's. Returns `folder`."""
    folder = Path(folder)
    components = make_components()
    local = {"_diffusers_version": DIFFUSERS_VERSION}
    write_json(
        folder / "model_index.json",
        {
            "_class_name": "Pipeline",
            **local,
            "scheduler": ["scheduler", "Scheduler"],
            "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "transformer": ["transformer", "Transformer2DModel"],
            "vqvae": ["diffusers", "VQModel"],
        },
    )
    scheduler = {"_class_name": "Scheduler", **local, "mask_token_id": VOCAB_SIZE - 1, "masking_schedule": "cosine"}
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    write_code_that_nobody_may_run(folder / "scheduler" / "scheduler.py")
    components["text_encoder"].save_pretrained(folder / "text_encoder")
    components["vqvae"].save_pretrained(folder / "vqvae")
    write_tokenizer(components["tokenizer"], folder / "tokenizer")

    config = {
        "attention_head_dim": 8,
        "axes_dims_rope": [2, 2, 4],
        "codebook_size": CODEBOOK_SIZE,
        "downsample": downsample,
        "guidance_embeds": False,
        "in_channels": 64,
        "joint_attention_dim": 16,
        "num_attention_heads": 2,
        "num_layers": 1,
        "num_single_layers": 2,
        "patch_size": 1,
        "pooled_projection_dim": 16,
        "upsample": downsample,
        "vocab_size": VOCAB_SIZE,
    }
    write_json(folder / "transformer" / "config.json", {"_class_name": "Transformer2DModel", **local, **config})
    write_code_that_nobody_may_run(folder / "transformer" / "transformer.py")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformer = MeissonicTransformer2DModel(**config)
    # Sharper predictions than random weights give, so that entropies differ from one position to the next.
    transformer.mlm_layer.conv2.weight.data.mul_(8)
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file(transformer.state_dict(), weights, metadata={"format": "pt"})
    return folder


def write_tokenizer(tokenizer, folder: Path) -> None:
    """The files of a tokenizer as transformers 4 wrote them."""
    write_json(folder / "vocab.json", tokenizer.get_vocab())
    (folder / "merges.txt").write_text("#version: 0.2\n")
    special = {f"{name}_token": getattr(tokenizer, f"{name}_token") for name in ("bos", "eos", "pad", "unk")}
    write_json(folder / "special_tokens_map.json", special)
    settings = {"add_prefix_space": False, "do_lower_case": True, "errors": "replace", "tokenizer_class": "CLIPTokenizer"}
    write_json(folder / "tokenizer_config.json", {**settings, **special, "model_max_length": tokenizer.model_max_length})
