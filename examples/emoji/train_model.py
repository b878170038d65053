#!/usr/bin/env python
"""Trains the text-to-image model of the emoji world on the pictures' tokens, and writes it in aMUSEd's format.

    python examples/emoji/train_model.py --world runs/emoji

Needs the files of world.py and train_tokenizer.py. Writes `transformer.pt`, and the repository `model` of VQModel, UVit2DModel,
CLIPTextModelWithProjection and CLIPTokenizer, with the averaged weights. `--export` writes that of a training under way.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import math
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import UVit2DModel
from tokenizers.pre_tokenizers import ByteLevel
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.swa_utils import AveragedModel
from train_tokenizer import GRID, NUM_CODES, load_vqvae
from training import run_steps, set_learning_rate
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer
from world import IMAGE_SIZE, Picture, load_world

from diffusers_infogain import InfoGainPipeline, InfoGainScheduler
from diffusers_infogain.files import read_json, save_json

GUIDANCE_SCALE = 2.0
MAX_CAPTION_TOKENS = 20
CAPTION_DROPOUT = 0.1


def merge_words(words: Sequence[str]) -> list[tuple[str, str]]:
    """Byte pairs to merge until every word is one token; of equally frequent ones the first in the alphabet."""
    pieces = [[*word[:-1], word[-1] + "</w>"] for word in sorted(set(words))]
    merges: list[tuple[str, str]] = []
    while pairs := Counter(pair for word in pieces for pair in itertools.pairwise(word)):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for word in pieces:
            i = 0
            while i < len(word) - 1:
                if (word[i], word[i + 1]) == best:
                    word[i : i + 2] = ["".join(best)]
                i += 1
    return merges


def build_tokenizer(captions: Sequence[str], path: Path) -> CLIPTokenizer:
    """A CLIP tokenizer with one token per word of the captions; others are split into bytes. Its merges are kept at `path`."""
    if not path.exists():
        # As CLIP splits captions: letters, single digits, anything else.
        words = [word for caption in captions for word in re.findall(r"[a-z]+|[0-9]|[^\sa-z0-9]+", caption)]
        save_json(merge_words(words), path)
    merges = [tuple(pair) for pair in read_json(path, list)]
    alphabet = sorted(ByteLevel.alphabet())
    tokens = [*alphabet, *(symbol + "</w>" for symbol in alphabet), *map("".join, merges), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=MAX_CAPTION_TOKENS, pad_token="<|endoftext|>")


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        projection_dim=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=MAX_CAPTION_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModelWithProjection(config)


def build_transformer() -> UVit2DModel:
    return UVit2DModel(
        hidden_size=160,
        num_hidden_layers=6,
        num_attention_heads=5,
        intermediate_size=384,
        block_out_channels=64,
        block_num_heads=2,
        # Only the zero padding of the depthwise convolutions encodes positions: three of them reach every cell of an 8x8 grid.
        num_res_blocks=3,
        in_channels=64,
        vocab_size=NUM_CODES + 1,
        codebook_size=NUM_CODES,
        encoder_hidden_size=128,
        cond_embed_dim=128,
        micro_cond_encode_dim=8,
        micro_cond_embed_dim=40,
        sample_size=GRID,
    )


def micro_conditions(batch: int) -> torch.Tensor:
    """AmusedPipeline's defaults: width, height, crop corner, aesthetic score."""
    return torch.tensor([[IMAGE_SIZE, IMAGE_SIZE, 0.0, 0.0, 6.0]]).expand(batch, -1)


def tokenize(tokenizer: CLIPTokenizer, texts: Sequence[str]) -> torch.Tensor:
    return tokenizer(
        list(texts), padding="max_length", max_length=MAX_CAPTION_TOKENS, truncation=True, return_tensors="pt"
    ).input_ids


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up, the peak, and linear decay in the last fifth, so that a longer training begins as a shorter one."""
    return peak * min(1.0, (step + 1) / 300, 0.02 + (steps - step) / (0.2 * steps))


def weights_of(pictures: Sequence[Picture]) -> torch.Tensor:
    """How often each picture is drawn: none that is held out, and the n skin tones of one n^½ times as often as one without."""
    count = Counter((p.name, p.set) for p in pictures if p.split == "train")
    return torch.tensor([count[p.name, p.set] ** -0.5 if p.split == "train" else 0.0 for p in pictures])


@torch.no_grad()
def follow(averaged: Sequence[torch.Tensor], current: Sequence[torch.Tensor], num_averaged: torch.Tensor) -> None:
    """Exponential averages of weights, over fewer steps at the beginning."""
    n = float(num_averaged)
    torch._foreach_lerp_(list(averaged), list(current), 1 - min(0.999, (1 + n) / (10 + n)))


def build_models(tokenizer: CLIPTokenizer, seed: int) -> tuple[torch.nn.ModuleDict, AveragedModel]:
    torch.manual_seed(seed)  # the initial weights; every later draw has its own generator
    models = torch.nn.ModuleDict({"transformer": build_transformer(), "text_encoder": build_text_encoder(tokenizer)})
    return models, AveragedModel(models, multi_avg_fn=follow)


def train(args: argparse.Namespace, pictures: list[Picture], tokenizer: CLIPTokenizer) -> AveragedModel:
    """Masked-token prediction with MaskGIT's cosine mask ratios; one caption in ten is dropped for guidance."""
    models, average = build_models(tokenizer, args.seed)
    # At the transformer's learning rate the text encoder's hidden states grow until a word's own state outweighs its context.
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in models[name].parameters() if (p.ndim > 1) == is_matrix], "weight_decay": decay, "scale": scale}
            for name, scale in (("transformer", 1.0), ("text_encoder", 0.3))
            for is_matrix, decay in ((True, 0.03), (False, 0.0))
        ],
        betas=(0.9, 0.98),
        fused=True,
    )
    generator = torch.Generator().manual_seed(args.seed + 3)
    denoise = torch.compile(models["transformer"]) if args.compile else models["transformer"]
    codes = torch.load(args.world / "tokens.pt", weights_only=True)
    text = tokenize(tokenizer, [picture.caption for picture in pictures])
    empty, weights = tokenize(tokenizer, [""]), weights_of(pictures)

    def step(number: int) -> dict[str, float]:
        b = args.batch_size
        drawn = torch.multinomial(weights, b, replacement=True, generator=generator)
        target = codes[drawn].long()
        caption = torch.where(torch.rand(b, 1, generator=generator) < CAPTION_DROPOUT, empty, text[drawn])
        ratio = torch.cos(torch.rand(b, 1, generator=generator) * math.pi / 2)
        order = torch.rand(target.shape, generator=generator).argsort(1).argsort(1)
        masked = order < (ratio * GRID**2).round().clamp(min=1)
        tokens = torch.where(masked, NUM_CODES, target).view(-1, GRID, GRID)
        # On a CPU the backward pass of fused attention is the slowest part of the step at this size; plain attention's is not.
        autocast = torch.autocast("cpu", torch.bfloat16) if args.dtype == "bfloat16" else contextlib.nullcontext()
        with sdpa_kernel(SDPBackend.MATH), autocast:
            encoded = models["text_encoder"](caption, output_hidden_states=True)
            logits = denoise(
                tokens,
                encoder_hidden_states=encoded.hidden_states[-2],
                pooled_text_emb=encoded.text_embeds,
                micro_conds=micro_conditions(b),
            )
        logits = logits.flatten(2).transpose(1, 2)[masked].float()
        loss = F.cross_entropy(logits, target[masked])
        set_learning_rate(optimizer, learning_rate(number, args.steps, args.learning_rate))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(models.parameters(), 1.0)
        optimizer.step()
        average.update_parameters(models)
        return {"nats per token": loss.item(), "right": (logits.argmax(1) == target[masked]).float().mean().item()}

    parts = {"models": models, "average": average, "optimizer": optimizer}
    run_steps(args.world / "transformer.pt", args.steps, parts, generator, step)
    return average


def export(folder: Path, pictures: list[Picture], tokenizer: CLIPTokenizer, average: AveragedModel) -> None:
    """Writes the pipeline to `model` in the folder, and with it which captions were held out."""
    models = average.module.eval()
    pipe = InfoGainPipeline(
        load_vqvae(folder),
        tokenizer,
        models["text_encoder"],
        models["transformer"],
        InfoGainScheduler(mask_token_id=NUM_CODES),
        default_guidance_scale=GUIDANCE_SCALE,
    )
    pipe.save_pretrained(folder / "model")
    held_out = {p.split: [q.caption for q in pictures if q.split == p.split] for p in pictures if p.split != "train"}
    save_json(held_out, folder / "model" / "held_out.json")
    print(f"Wrote {folder / 'model'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--world", type=Path, default=Path("runs/emoji"), help="folder of world.py; checkpoints go there too")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="of the autocast matrix products")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true", help="compile the transformer (needs a C++ compiler)")
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--export", action="store_true", help="write the model of the last checkpoint without training")
    args = parser.parse_args()
    _, pictures = load_world(args.world)
    tokenizer = build_tokenizer([picture.caption for picture in pictures], args.world / "merges.json")
    if args.export:
        average = build_models(tokenizer, args.seed)[1]
        average.load_state_dict(torch.load(args.world / "transformer.pt", weights_only=True)["average"])
    else:
        average = train(args, pictures, tokenizer)
    export(args.world, pictures, tokenizer, average)


if __name__ == "__main__":
    main()
