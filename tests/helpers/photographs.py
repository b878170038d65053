"""All published families of image models, tiny, for examples/reproduce_photographs.sh."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from diffusers import AmusedPipeline
from PIL import Image

from helpers.amused import make_components
from helpers.checkpoints import (
    write_lumina_repository,
    write_magvit_repository,
    write_mmada_repository,
    write_phi_repository,
    write_showo_repository,
)
from helpers.checkpoints_maskgit import write_maskgit_checkpoint
from helpers.checkpoints_meissonic import write_meissonic_repository
from helpers.checkpoints_titok import write_titok_repositories


def write_families(folder: Path) -> dict[str, str]:
    """Writes every family in its published format; returns the environment variables that name them to the script."""
    AmusedPipeline(**make_components()).save_pretrained(folder / "amused")
    write_meissonic_repository(folder / "meissonic", downsample=True)
    write_meissonic_repository(folder / "monetico", downsample=False)
    write_maskgit_checkpoint(folder / "maskgit")
    write_titok_repositories(folder / "titok")
    write_mmada_repository(folder / "mmada")
    write_magvit_repository(folder / "magvit")
    write_showo_repository(folder / "showo_256", num_vq_tokens=16)
    write_showo_repository(folder / "showo_512", num_vq_tokens=36)
    write_phi_repository(folder / "phi-1_5")
    write_lumina_repository(folder / "lumina")
    models = {"amused_256": "amused", "amused_512": "amused", "maskgit_256": "maskgit", "maskgit_384": "maskgit"}
    models |= {name: name for name in ("meissonic", "monetico", "mmada", "showo_256", "showo_512", "lumina")}
    models |= dict.fromkeys(("titok_l32", "titok_s128"), "titok/generator")
    environment = {f"MODEL_{family}": str(folder / name) for family, name in models.items()}
    environment |= dict.fromkeys(("VQVAE_titok_l32", "VQVAE_titok_s128"), str(folder / "titok" / "tokenizer"))
    environment |= {f"VARIANT_maskgit_{size}": "256_tiny" for size in (256, 384)}
    environment |= {f"VQVAE_{family}": str(folder / "magvit") for family in ("mmada", "showo_256", "showo_512")}
    environment |= {f"LANGUAGE_MODEL_showo_{size}": str(folder / "phi-1_5") for size in (256, 512)}
    return environment | {
        "TEXT_ENCODER_meissonic": str(folder / "monetico" / "text_encoder"),
    }


def write_coco(folder: Path, count: int) -> dict[str, str]:
    """Noisy photographs and captions as COCO has them, two for each, in another order; returns the variables that name them."""
    (folder / "val").mkdir(parents=True)
    generator = np.random.default_rng(0)
    images, annotations = [], []
    for i in range(count):
        name = f"COCO_val2014_{i:012d}.jpg"
        Image.fromarray(generator.integers(256, size=(40, 50 + i, 3), dtype=np.uint8)).save(folder / "val" / name)
        images.insert(0, {"id": i, "file_name": name})
        annotations.insert(0, {"id": 2 * i, "image_id": i, "caption": f"a red cat {'on the mat ' * (i % 3)}\n"})
        annotations.append({"id": 2 * i + 1, "image_id": i, "caption": "another caption"})
    (folder / "captions.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    return {"COCO_CAPTIONS": str(folder / "captions.json"), "COCO_IMAGES": str(folder / "val")}


def write_commands(folder: Path) -> None:
    """`python` and `diffusers-infogain` as they are here."""
    folder.mkdir()
    for name, words in (("python", ""), ("diffusers-infogain", "-m diffusers_infogain.cli ")):
        (folder / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {words}"$@"\n')
        (folder / name).chmod(0o755)
