#!/usr/bin/env python
"""Makes the image tokenizer of the emoji world: 64 x 64 pixels to 8 x 8 of 1,024 codes, and a decoder for them.

    python examples/emoji/train_tokenizer.py --world runs/emoji --codes    # the codes only: all that train_model.py needs
    python examples/emoji/train_tokenizer.py --world runs/emoji

Codes are means of patches of 8 x 8 pixels (k-means), which takes minutes; the time goes into the decoder, which sees all codes of
a picture together. Needs the world and the "loss" classifier. Writes `codebook.pt`, the pictures' `tokens.pt`, and `vq.pt`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from classifier import as_tensor, load_classifier
from diffusers import VQModel
from torch import nn
from tqdm.auto import tqdm
from training import learning_rate, run_steps, set_learning_rate
from world import IMAGE_SIZE, Picture, load_world

from diffusers_infogain.files import replacing

NUM_CODES = 1024
GRID = 8
PATCH = IMAGE_SIZE // GRID
LATENT_CHANNELS = 32


def build_vqvae() -> VQModel:
    """Every resolution takes about as much time as the others."""
    return VQModel(
        block_out_channels=(16, 32, 64, 128),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=64,
        vq_embed_dim=LATENT_CHANNELS,
        num_vq_embeddings=NUM_CODES,
        norm_num_groups=8,
        sample_size=IMAGE_SIZE,
        mid_block_add_attention=True,
        lookup_from_codebook=True,
        force_upcast=True,
    )


def patches(pictures: torch.Tensor) -> torch.Tensor:
    """The pixels that each token stands for: (B, 3, 64, 64) to (B, 64, 192)."""
    return F.unfold(pictures, PATCH, stride=PATCH).transpose(1, 2)


def k_means(x: torch.Tensor, num: int, steps: int, generator: torch.Generator) -> torch.Tensor:
    """Means (num, C) of clusters of points (N, C); an empty cluster begins anew at a random point."""
    means = x[torch.randperm(len(x), generator=generator)[:num]].clone()
    for _ in tqdm(range(steps), desc="k-means", mininterval=5):
        nearest = torch.cat([nearest_codes(part, means) for part in x.split(16384)])
        count = torch.bincount(nearest, minlength=num)[:, None]
        sums = torch.zeros_like(means).index_add_(0, nearest, x)
        anew = x[torch.randint(len(x), (num,), generator=generator)]
        means = torch.where(count > 0, sums / count.clamp(min=1), anew)
    return means


def nearest_codes(x: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """The numbers (N,) of the codes (K, C) nearest to x (N, C)."""
    return (codes.square().sum(1) - 2 * x @ codes.T).argmin(1)


def fit_codebook(folder: Path, pixels: np.ndarray, pictures: list[Picture], steps: int, seed: int) -> dict[str, torch.Tensor]:
    """The mean (192,) and principal axes (192, C) of the training pictures' patches, and `codes` (1024, C); kept in a file.

    White patches, of which there are most, are one code of their own.
    """
    path = folder / "codebook.pt"
    if path.exists():
        return torch.load(path, weights_only=True)
    generator = torch.Generator().manual_seed(seed)
    train = [i for i, picture in enumerate(pictures) if picture.split == "train"]
    found = [patches(as_tensor(pixels[train[i : i + 500]])).flatten(0, 1) for i in range(0, len(train), 500)]
    data = torch.cat([part[part.amin(1) < 0.999] for part in found])
    mean = data.mean(0)
    axes = torch.linalg.eigh((data - mean).T @ (data - mean))[1][:, -LATENT_CHANNELS:]
    coordinates = (data - mean) @ axes
    white = (torch.ones_like(mean) - mean) @ axes
    codes = torch.cat([k_means(coordinates, NUM_CODES - 1, steps, generator), white[None]])
    state = {"mean": mean, "axes": axes / codes.std(), "codes": codes / codes.std()}
    with replacing(path) as file:
        torch.save(state, file)
    return state


def coordinates(pictures: torch.Tensor, book: dict[str, torch.Tensor]) -> torch.Tensor:
    """The patches' principal coordinates, which the encoder learns: (B, 3, 64, 64) to (B, 64, C)."""
    return (patches(pictures) - book["mean"]) @ book["axes"]


def encode_pictures(pixels: np.ndarray, book: dict[str, torch.Tensor]) -> torch.Tensor:
    """The tokens (N, 64) of pictures."""
    parts = [coordinates(as_tensor(pixels[i : i + 256]), book) for i in range(0, len(pixels), 256)]
    return torch.cat([nearest_codes(part.flatten(0, 1), book["codes"]).view(len(part), -1) for part in parts])


def perceptual(a: list[torch.Tensor], b: list[torch.Tensor]) -> torch.Tensor:
    """Mean squared distance of feature maps whose vectors have length 1, summed over maps."""
    return sum(
        (F.normalize(x.float(), dim=1) - F.normalize(y.float(), dim=1)).square().sum(1).mean() for x, y in zip(a, b, strict=True)
    )


def decode(vqvae: VQModel, tokens: torch.Tensor) -> torch.Tensor:
    """The pictures (B, 3, 64, 64) of tokens (B, 64)."""
    return vqvae.decode(tokens, force_not_quantize=True, shape=(len(tokens), GRID, GRID, LATENT_CHANNELS)).sample


def train(args: argparse.Namespace, pixels: np.ndarray, pictures: list[Picture], tokens: torch.Tensor, book: dict) -> None:
    torch.manual_seed(args.seed)  # the initial weights; every later draw has its own generator
    vqvae = build_vqvae()
    vqvae.quantize.embedding.weight.data.copy_(book["codes"])
    vqvae.quantize.requires_grad_(False)
    features = load_classifier(args.world / "loss.pt", pictures, "loss")
    generator = torch.Generator().manual_seed(args.seed + 1)
    chosen = torch.tensor([i for i, p in enumerate(pictures) if p.split == "train"])
    optimizer = torch.optim.AdamW(vqvae.parameters(), betas=(0.9, 0.98), weight_decay=1e-4, fused=True)

    def step(number: int) -> dict[str, float]:
        batch = chosen[torch.randint(len(chosen), (args.batch_size,), generator=generator)]
        images = as_tensor(pixels[batch.numpy()])
        with torch.autocast("cpu", torch.bfloat16, enabled=args.dtype == "bfloat16"):
            decoded = decode(vqvae, tokens[batch].long()).float()
            seen = perceptual(features.maps(decoded), features.maps(images))
            # The encoder has a task that is easy beside the decoder's, so it gets every fourth batch.
            encoder = 0.0
            if number % 4 == 0:
                latents = vqvae.encode(images).latents.float().flatten(2).transpose(1, 2)
                encoder = F.mse_loss(latents, coordinates(images, book))
        l1, mse = F.l1_loss(decoded, images), F.mse_loss(decoded, images)
        set_learning_rate(optimizer, learning_rate(number, args.steps, args.learning_rate))
        optimizer.zero_grad(set_to_none=True)
        (l1 + mse + args.perceptual_weight * seen + encoder).backward()
        nn.utils.clip_grad_norm_(vqvae.parameters(), 1.0)
        optimizer.step()
        figures = {"l1": l1.item(), "psnr": -10 * mse.log10().item(), "perceptual": seen.item()}
        return figures | ({"encoder": encoder.item()} if number % 4 == 0 else {})

    run_steps(args.world / "vq.pt", args.steps, {"model": vqvae, "optimizer": optimizer}, generator, step)


def load_vqvae(folder: Path) -> VQModel:
    """The tokenizer of the last checkpoint."""
    vqvae = build_vqvae()
    vqvae.load_state_dict(torch.load(folder / "vq.pt", weights_only=True, map_location="cpu")["model"])
    return vqvae.requires_grad_(False).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--world", type=Path, default=Path("runs/emoji"), help="folder of world.py; checkpoints go there too")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="of the autocast convolutions")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--codes", action="store_true", help="find the codes and the pictures' tokens, and stop")
    parser.add_argument("--k-means-steps", type=int, default=30)
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    parser.add_argument("--perceptual-weight", type=float, default=0.5)
    args = parser.parse_args()
    pixels, pictures = load_world(args.world)
    book = fit_codebook(args.world, pixels, pictures, args.k_means_steps, args.seed)
    tokens = encode_pictures(pixels, book)
    with replacing(args.world / "tokens.pt") as file:
        torch.save(tokens.short(), file)
    if not args.codes:
        train(args, pixels, pictures, tokens, book)


if __name__ == "__main__":
    main()
