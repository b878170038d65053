"""Every family as it is published, with tiny random weights, and a short call that suits it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from diffusers_infogain import InfoGainPipeline, InfoGainTextPipeline, load
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
from helpers.checkpoints_text import write_bert, write_dream, write_llada, write_llada2, write_mdlm_qwen3, write_sdar
from helpers.checkpoints_titok import write_maskgen_repositories, write_titok_repositories


def _write_amused(folder: Path) -> Path:
    InfoGainPipeline(**make_components()).save_pretrained(folder)
    return folder


def _write_titok(folder: Path) -> Path:
    generator, _ = write_titok_repositories(folder)
    return generator


def _write_maskgen(folder: Path) -> Path:
    generator, _, _ = write_maskgen_repositories(folder)
    return Path(generator)


WRITERS: dict[str, Callable[..., Path]] = {
    "amused": _write_amused,
    "meissonic": lambda folder: write_meissonic_repository(folder, downsample=False),
    "maskgit": lambda folder: write_maskgit_checkpoint(folder),
    "titok": _write_titok,
    "maskgen": _write_maskgen,
    "mmada": write_mmada_repository,
    "showo": lambda folder: write_showo_repository(folder, num_vq_tokens=16),
    "lumina": write_lumina_repository,
    "llada": write_llada,
    "dream": write_dream,
    "sdar": write_sdar,
    "llada2": write_llada2,
    "a2d": write_mdlm_qwen3,
    "mmada-text": write_mmada_repository,
    "bert": write_bert,
}
BESIDE_MAGVIT = ("mmada", "showo")
TEXT = ("llada", "dream", "sdar", "llada2", "a2d", "mmada-text", "bert")


def write_published(root: Path, family: str, **config: Any) -> Path:
    """The repository of a family; MAGVIT-v2 and Phi's configuration, which others need, are beside it."""
    if family in BESIDE_MAGVIT and not (root / "magvit").exists():
        write_magvit_repository(root / "magvit")
        write_phi_repository(root / "phi-1_5")
    return WRITERS[family](root / family, **config)


def load_family(name: str, folder: Path, **arguments: Any) -> Any:
    """The pipeline of a family from its repository, or from a folder in diffusers' format."""
    if name in BESIDE_MAGVIT and not (folder / "model_index.json").exists():
        arguments["vqvae"] = folder.parent / "magvit"
        arguments |= {"language_model": folder.parent / "phi-1_5"} if name == "showo" else {}
    if name in ("titok", "maskgen") and not (folder / "model_index.json").exists():
        arguments["vqvae"] = folder.parent / "tokenizer"
        arguments |= {"text_encoder": folder.parent / "clip"} if name == "maskgen" else {}
    pipe = (InfoGainTextPipeline.from_pretrained if name == "mmada-text" else load)(folder, **arguments)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def network(pipe: Any) -> torch.nn.Module:
    """The model that predicts tokens."""
    return getattr(pipe, pipe.compiled_component)


def decode(pipe: Any, **arguments: Any) -> torch.Tensor:
    """The tokens of a short call."""
    generator = [torch.Generator().manual_seed(0)]
    if isinstance(pipe, InfoGainTextPipeline):
        arguments = {"input_ids": [[5, 6, 7]], "max_new_tokens": 8, "stop_at_eos": False, **arguments}
        return pipe(generator=generator, **arguments).sequences
    if "class_labels" in pipe.check_inputs.__annotations__:
        prompt, side = {"class_labels": 207}, None
    else:
        prompt, side = {"prompt": "a cat"}, None if pipe.canvas().only_side else 4 * pipe.vae_scale_factor
    arguments = {"num_inference_steps": 2, "output_type": "latent", "height": side, "width": side, **prompt, **arguments}
    return pipe(generator=generator, **arguments).images


def first_logits(pipe: Any, **arguments: Any) -> torch.Tensor:
    """What the network returns first in a short call: logits at masks, before any decision."""
    found: list[torch.Tensor] = []

    def keep(module: Any, inputs: Any, output: Any) -> None:
        found.append(getattr(output, "logits", output))

    handle = network(pipe).register_forward_hook(keep)
    try:
        decode(pipe, **arguments)
    finally:
        handle.remove()
    return found[0].float()
