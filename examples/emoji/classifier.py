#!/usr/bin/env python
"""Trains two classifiers of pictures: one whose features are a loss of the image tokenizer, and the judge of generated pictures.

    python examples/emoji/classifier.py loss --world runs/emoji
    python examples/emoji/classifier.py judge --world runs/emoji

They have different architectures and seeds, so that the judge does not see what the tokenizer was trained to please.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from training import learning_rate, run_steps, set_learning_rate
from world import SKIN_TONES, SPLITS, Picture, load_world

from diffusers_infogain.evaluation.statistics import Figure
from diffusers_infogain.files import save_json

TONES = (None, *SKIN_TONES)


def conv(channels: int, out_channels: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, out_channels, 3, stride, 1, bias=False), nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True)
    )


class Residual(nn.Module):
    def __init__(self, channels: int, out_channels: int):
        super().__init__()
        self.body = nn.Sequential(
            conv(channels, out_channels, 2),
            nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False),
            nn.BatchNorm2d(out_channels),
        )
        self.short = nn.Sequential(
            nn.AvgPool2d(2), nn.Conv2d(channels, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.body(x) + self.short(x))


class Classifier(nn.Module):
    """Set, skin tone and name of pictures (B, 3, 64, 64) in [0, 1].

    Args:
        sets, names: What there is to tell apart, in the order of the logits.
        kind: "loss", plain convolutions; or "judge", a wider residual network.
    """

    embedding = 64

    def __init__(self, sets: Sequence[str], names: Sequence[str], kind: str):
        super().__init__()
        self.sets, self.names = list(sets), list(names)
        if kind == "loss":
            stages = [nn.Sequential(conv(3, 16), conv(16, 16))]
            stages += [nn.Sequential(conv(c, 2 * c, 2), conv(2 * c, 2 * c)) for c in (16, 32, 64)]
            width = 128
        else:
            stages = [conv(3, 32, 2), Residual(32, 64), nn.Sequential(Residual(64, 128), Residual(128, 256))]
            width = 256
        self.stages = nn.ModuleList(stages)
        self.neck = nn.Sequential(nn.Linear(width, self.embedding), nn.BatchNorm1d(self.embedding))
        self.heads = nn.ModuleDict(
            {
                "set": nn.Linear(self.embedding, len(sets)),
                "tone": nn.Linear(self.embedding, len(TONES)),
                "name": nn.Linear(self.embedding, len(names)),
            }
        )

    def maps(self, pictures: torch.Tensor) -> list[torch.Tensor]:
        """The feature maps after each stage."""
        x, found = 2 * pictures - 1, []
        for stage in self.stages:
            x = stage(x)
            found.append(x)
        return found

    def features(self, pictures: torch.Tensor) -> torch.Tensor:
        """(B, 64), the common input of the heads."""
        return self.neck(self.maps(pictures)[-1].mean((2, 3)).float())

    def forward(self, pictures: torch.Tensor) -> dict[str, torch.Tensor]:
        features = self.features(pictures)
        return {name: head(features) for name, head in self.heads.items()}


def labels(pictures: Sequence[Picture], sets: Sequence[str], names: Sequence[str]) -> dict[str, torch.Tensor]:
    """The right answers; -1 for a name that the classifier does not know."""
    number = {name: i for i, name in enumerate(names)}
    return {
        "set": torch.tensor([sets.index(p.set) for p in pictures]),
        "tone": torch.tensor([TONES.index(p.tone) for p in pictures]),
        "name": torch.tensor([number.get(p.name, -1) for p in pictures]),
    }


def distort(pictures: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Pictures (B, 3, 64, 64) a little rotated, scaled, moved, blurred and noisy; not mirrored, as names tell left from right."""
    b = len(pictures)

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return low + (high - low) * torch.rand(b, *shape, generator=generator)

    angle, scale = uniform(-0.15, 0.15), uniform(0.9, 1.15)
    cos, sin = angle.cos() * scale, angle.sin() * scale
    theta = torch.stack([cos, -sin, uniform(-0.1, 0.1), sin, cos, uniform(-0.1, 0.1)], 1).view(b, 2, 3)
    grid = F.affine_grid(theta, list(pictures.shape), align_corners=False)
    moved = 1 - F.grid_sample(1 - pictures, grid, align_corners=False)  # white outside
    blurred = F.avg_pool2d(F.pad(moved, (1, 1, 1, 1), mode="replicate"), 3, 1)
    share = uniform(-0.5, 1, 1, 1, 1).clamp(min=0)
    noise = uniform(0, 0.06, 1, 1, 1) * torch.randn(pictures.shape, generator=generator)
    return (moved + share * (blurred - moved) + noise).clamp(0, 1)


def as_tensor(pixels: np.ndarray) -> torch.Tensor:
    """Bytes (N, 64, 64, 3) as numbers (N, 3, 64, 64) in [0, 1]."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255


def vocabulary(pictures: Sequence[Picture]) -> tuple[list[str], list[str]]:
    """All sets, and the names of the training pictures, sorted."""
    return sorted({p.set for p in pictures}), sorted({p.name for p in pictures if p.split == "train"})


def train(args: argparse.Namespace, pixels: np.ndarray, pictures: list[Picture]) -> Classifier:
    sets, names = vocabulary(pictures)
    seed = args.seed + 10 * (args.kind == "judge")
    torch.manual_seed(seed)  # the initial weights; every later draw has its own generator
    model = Classifier(sets, names, args.kind)
    generator = torch.Generator().manual_seed(seed + 1)
    chosen = torch.tensor([i for i, p in enumerate(pictures) if p.split == "train"])
    targets = labels(pictures, sets, names)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05, fused=True)

    def step(number: int) -> dict[str, float]:
        batch = chosen[torch.randint(len(chosen), (args.batch_size,), generator=generator)]
        images = distort(as_tensor(pixels[batch.numpy()]), generator)
        with torch.autocast("cpu", torch.bfloat16, enabled=args.dtype == "bfloat16"):
            maps = model.maps(images)[-1]
        features = model.neck(maps.float().mean((2, 3)))
        logits = {name: head(features) for name, head in model.heads.items()}
        losses = {name: F.cross_entropy(logits[name], targets[name][batch], label_smoothing=0.1) for name in logits}
        set_learning_rate(optimizer, learning_rate(number, args.steps, args.learning_rate))
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        right = {f"{name} right": (logits[name].argmax(1) == targets[name][batch]).float().mean() for name in logits}
        return {key: value.item() for key, value in (losses | right).items()}

    run_steps(args.world / f"{args.kind}.pt", args.steps, {"model": model, "optimizer": optimizer}, generator, step)
    return model.eval()


def load_classifier(path: Path, pictures: Sequence[Picture], kind: str) -> Classifier:
    """A trained classifier, to look with only."""
    model = Classifier(*vocabulary(pictures), kind)
    model.load_state_dict(torch.load(path, weights_only=True, map_location="cpu")["model"])
    return model.eval().requires_grad_(False)


@torch.no_grad()
def verdicts(model: Classifier, images: torch.Tensor, pictures: Sequence[Picture]) -> dict[str, list[bool | None]]:
    """Whether the model sees in each image (N, 3, 64, 64) the set, the tone and the name that it should show.

    For pictures without a skin tone "tone" says whether none is seen. Names that the model does not know are None.
    """
    targets = labels(pictures, model.sets, model.names)
    logits: dict[str, list[torch.Tensor]] = {name: [] for name in model.heads}
    for part in images.split(256):
        for name, value in model(part).items():
            logits[name].append(value)
    each = {name: torch.cat(value) for name, value in logits.items()}
    found = {name: (each[name].argmax(1) == targets[name]).tolist() for name in each}
    found["name_top5"] = (each["name"].topk(min(5, len(model.names)), 1).indices == targets["name"][:, None]).any(1).tolist()
    known = (targets["name"] >= 0).tolist()
    for name in ("name", "name_top5"):
        found[name] = [right if k else None for right, k in zip(found[name], known, strict=True)]
    return found


def share(values: Sequence[bool | None]) -> Figure | None:
    """The share of True among the answers, with its standard error; None if there are none."""
    given = [value for value in values if value is not None]
    if not given:
        return None
    p = sum(given) / len(given)
    return Figure(p, math.sqrt(p * (1 - p) / len(given)), len(given))


def accuracy(model: Classifier, images: torch.Tensor, pictures: Sequence[Picture]) -> dict[str, Figure]:
    """Shares of right answers: "set", "tone" (of all pictures), "tone_given" (of those with one), "name", "name_top5"."""
    found = verdicts(model, images, pictures)
    found["tone_given"] = [right if p.tone else None for right, p in zip(found["tone"], pictures, strict=True)]
    return {name: figure for name, values in found.items() if (figure := share(values))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("kind", choices=("loss", "judge"))
    parser.add_argument("--world", type=Path, default=Path("runs/emoji"), help="folder of world.py; checkpoints go there too")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="of the autocast convolutions")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=2500, help="the loss needs about 1100, the judge 2500")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    args = parser.parse_args()
    pixels, pictures = load_world(args.world)
    model = train(args, pixels, pictures)
    report = {}
    for splits in (SPLITS, tuple(f"{split} unseen" for split in SPLITS)):
        held = [i for i, p in enumerate(pictures) if p.split in splits]
        if held:
            figures = accuracy(model, as_tensor(pixels[held]), [pictures[i] for i in held])
            name = "unseen names" if splits != SPLITS else "held-out combinations"
            report[name] = {key: vars(figure) for key, figure in figures.items()}
            print(f"{name}: " + ", ".join(f"{key} {figure}" for key, figure in figures.items()))
    save_json(report, args.world / f"{args.kind}_accuracy.json")


if __name__ == "__main__":
    main()
