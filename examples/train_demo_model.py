#!/usr/bin/env python
"""Trains the text-to-image model that the package ships as "demo", and prints what it reached.

    python examples/train_demo_model.py --output runs/demo

Two hours on two CPU cores with bfloat16 instructions (pass `--dtype float32` without them), minutes on a GPU. The run is
seeded, writes a checkpoint as it goes, and goes on from it when started again. The result is a repository in aMUSEd's
format: VQModel, UVit2DModel, CLIPTextModelWithProjection, CLIPTokenizer.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AmusedPipeline, AmusedScheduler, UVit2DModel, VQModel
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, WhitespaceSplit
from tokenizers.trainers import BpeTrainer
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm.auto import tqdm
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from diffusers_infogain.demo import shapes

CODEBOOK_SIZE = 512
PATCH = 8
LATENT_CHANNELS = 32
GRID = shapes.IMAGE_SIZE // PATCH
MAX_CAPTION_TOKENS = 16


def build_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer with one token per word of the demo world; other words fall apart into bytes."""
    alphabet = sorted(ByteLevel.alphabet())
    bpe = Tokenizer(BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = WhitespaceSplit()
    # The limit is never reached: training ends when every word is one token.
    trainer = BpeTrainer(vocab_size=10_000, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False)
    bpe.train_from_iterator([caption.text for caption in shapes.all_captions()], trainer)
    model = json.loads(bpe.to_str())["model"]
    vocabulary = dict(model["vocab"])
    for token in (*(symbol + "</w>" for symbol in alphabet), "<|startoftext|>", "<|endoftext|>"):
        vocabulary.setdefault(token, len(vocabulary))
    merges = [tuple(pair) for pair in model["merges"]]
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=MAX_CAPTION_TOKENS, pad_token="<|endoftext|>")


def build_vqvae() -> VQModel:
    return VQModel(
        block_out_channels=(32, 48, 64, 80),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        vq_embed_dim=LATENT_CHANNELS,
        num_vq_embeddings=CODEBOOK_SIZE,
        norm_num_groups=8,
        sample_size=shapes.IMAGE_SIZE,
        mid_block_add_attention=False,
        lookup_from_codebook=True,
        force_upcast=True,
    )


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
        hidden_size=128,
        num_hidden_layers=5,
        num_attention_heads=4,
        intermediate_size=384,
        block_out_channels=64,
        block_num_heads=2,
        # Positions come from the zero padding of the depthwise convolutions alone: three of them reach every cell of an 8x8 grid.
        num_res_blocks=3,
        in_channels=64,
        vocab_size=CODEBOOK_SIZE + 1,
        codebook_size=CODEBOOK_SIZE,
        encoder_hidden_size=128,
        cond_embed_dim=128,
        micro_cond_encode_dim=8,
        micro_cond_embed_dim=40,
        sample_size=GRID,
    )


def atomic_save(state: dict, path: Path) -> None:
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        torch.save(state, file)
    os.replace(file.name, path)


def learning_rate(step: int, steps: int, peak: float, warmup: int = 500) -> float:
    return peak * min(1.0, (step + 1) / warmup) * max(0.02, 0.5 * (1 + math.cos(math.pi * step / steps)))


def generate_images(num: int, generator: torch.Generator) -> tuple[torch.Tensor, list[shapes.Caption]]:
    captions = shapes.sample_captions(num, generator)
    return shapes.render(shapes.sample_scenes(captions, generator)), captions


def patches(images: torch.Tensor) -> torch.Tensor:
    """(B, 3, 64, 64) to (B, 8, 8, 192): the pixels of every token's own square."""
    b, c, h, w = images.shape
    cut = images.view(b, c, h // PATCH, PATCH, w // PATCH, PATCH)
    return cut.permute(0, 2, 4, 1, 3, 5).reshape(b, h // PATCH, w // PATCH, c * PATCH * PATCH)


def fit_codebook(folder: Path, seed: int) -> dict[str, torch.Tensor]:
    """Principal axes of the patches, and k-means centres among them: `mean` (192,), `axes` (192, C), `codebook` (512, C).

    A code that speaks of its own patch only, and of nothing else in the image, leaves no two codes for one content, so the
    entropies that a sampler sees are about the scene.
    """
    path = folder / "codebook.pt"
    if path.exists():
        return torch.load(path, weights_only=True)
    generator = torch.Generator().manual_seed(seed)
    data = torch.cat([patches(generate_images(500, generator)[0]).flatten(0, 2) for _ in range(16)])
    mean = data.mean(0)
    axes = torch.linalg.eigh((data - mean).T @ (data - mean))[1][:, -LATENT_CHANNELS:]
    points = torch.unique(((data - mean) @ axes * 1e3).round(), dim=0) / 1e3
    codebook = points[:1]
    distance = torch.cdist(points, codebook)[:, 0]
    while len(codebook) < CODEBOOK_SIZE:  # farthest-point start, then Lloyd's iterations over the distinct patches
        codebook = torch.cat([codebook, points[distance.argmax()][None]])
        distance = torch.minimum(distance, torch.cdist(points, codebook[-1:])[:, 0])
    for _ in range(50):
        nearest = torch.cdist(points, codebook).argmin(1)
        sums = torch.zeros_like(codebook).index_add_(0, nearest, points)
        counts = torch.bincount(nearest, minlength=CODEBOOK_SIZE).clamp(min=1)[:, None]
        codebook = sums / counts
    error = torch.cdist(points, codebook).amin(1).square().mean().sqrt()
    print(f"codebook: {len(points)} distinct patches, rms distance to their code {error:.4f}", flush=True)
    scale = codebook.std()
    state = {"mean": mean, "axes": axes / scale, "codebook": codebook / scale}
    atomic_save(state, path)
    return state


def coordinates(images: torch.Tensor, book: dict[str, torch.Tensor]) -> torch.Tensor:
    """The latents that the encoder learns, (B, 8, 8, C)."""
    return (patches(images) - book["mean"]) @ book["axes"]


def nearest_codes(latents: torch.Tensor, book: dict[str, torch.Tensor]) -> torch.Tensor:
    """(B, 8, 8, C) to (B, 64) codes."""
    return torch.cdist(latents.flatten(0, 2), book["codebook"]).argmin(1).view(len(latents), -1)


def train_vqvae(args: argparse.Namespace, book: dict[str, torch.Tensor], device: torch.device) -> VQModel:
    """Encoder: towards the principal coordinates of each patch. Decoder: from the nearest codes back to the image."""
    path = args.output / "vqvae.pt"
    torch.manual_seed(args.seed)  # the initial weights; every later draw has its own generator
    vqvae = build_vqvae().to(device)
    vqvae.quantize.embedding.weight.data.copy_(book["codebook"])
    vqvae.quantize.requires_grad_(False)
    generator = torch.Generator().manual_seed(args.seed + 1)
    optimizer = torch.optim.AdamW(vqvae.parameters(), lr=1e-3, weight_decay=1e-4, fused=True)
    start = 0
    if path.exists():
        state = torch.load(path, weights_only=True, map_location=device)
        vqvae.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["generator"].cpu())
        start = state["step"]
    progress = tqdm(range(start, args.vq_steps), initial=start, total=args.vq_steps, desc="VQ", mininterval=10)
    for step in progress:
        images = generate_images(args.vq_batch_size, generator)[0].to(device)
        target = coordinates(images, book)
        codes = nearest_codes(target, book)
        with torch.autocast(device.type, args.dtype, enabled=args.dtype != torch.float32):
            encoded = vqvae.encode(images).latents.float()
            shape = (len(images), GRID, GRID, LATENT_CHANNELS)
            decoded = vqvae.decode(codes, force_not_quantize=True, shape=shape).sample.float()
        reconstruction = F.l1_loss(decoded, images) + F.mse_loss(decoded, images)
        loss = F.mse_loss(encoded, target.permute(0, 3, 1, 2)) + 4 * reconstruction
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.vq_steps, 2e-3, 200)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vqvae.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0:
            right = nearest_codes(encoded.detach().permute(0, 2, 3, 1), book) == codes
            objects = right[codes != codes.flatten().mode().values].float().mean()
            line = f"l1 {F.l1_loss(decoded, images):.4f}, codes right {right.float().mean():.4f}, of objects {objects:.4f}"
            progress.set_postfix_str(line)
        if (step + 1) % 500 == 0 or step + 1 == args.vq_steps:
            print(f"VQ step {step + 1}: {line}", flush=True)
            state = {"model": vqvae.state_dict(), "optimizer": optimizer.state_dict(), "generator": generator.get_state()}
            atomic_save(state | {"step": step + 1}, path)
    return vqvae.requires_grad_(False).eval()


def encode_pool(args: argparse.Namespace, book: dict[str, torch.Tensor], tokenizer: CLIPTokenizer):
    """Tokens of the training images (N, 64) and of their captions (N, 16), made once."""
    path = args.output / "pool.pt"
    if path.exists():
        state = torch.load(path, weights_only=True)
        return state["codes"], state["text"]
    generator = torch.Generator().manual_seed(args.seed + 2)
    codes, text = [], []
    for _ in tqdm(range(0, args.pool_size, 500), desc="encode", mininterval=10):
        images, captions = generate_images(500, generator)
        codes.append(nearest_codes(coordinates(images, book), book).short())
        text.append(tokenize(tokenizer, [caption.text for caption in captions]).short())
    state = {"codes": torch.cat(codes), "text": torch.cat(text)}
    atomic_save(state, path)
    return state["codes"], state["text"]


def tokenize(tokenizer: CLIPTokenizer, texts: list[str]) -> torch.Tensor:
    return tokenizer(texts, padding="max_length", max_length=MAX_CAPTION_TOKENS, truncation=True, return_tensors="pt").input_ids


def micro_conditions(batch: int, device: torch.device) -> torch.Tensor:
    """AmusedPipeline's defaults: width, height, crop corner, aesthetic score."""
    return torch.tensor([[shapes.IMAGE_SIZE, shapes.IMAGE_SIZE, 0.0, 0.0, 6.0]], device=device).expand(batch, -1)


def train_transformer(args, codes: torch.Tensor, text: torch.Tensor, tokenizer: CLIPTokenizer, device: torch.device):
    """Masked-token prediction with MaskGIT's cosine mask ratios; one caption in ten is dropped for guidance."""
    path = args.output / "transformer.pt"
    torch.manual_seed(args.seed)  # the initial weights; every later draw has its own generator
    models = torch.nn.ModuleDict({"transformer": build_transformer(), "text_encoder": build_text_encoder(tokenizer)}).to(device)
    average = torch.optim.swa_utils.AveragedModel(models, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.999))
    matrices = [p for p in models.parameters() if p.ndim > 1]
    vectors = [p for p in models.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.03}, {"params": vectors, "weight_decay": 0.0}],
        betas=(0.9, 0.98),
        fused=True,
    )
    generator = torch.Generator().manual_seed(args.seed + 3)
    denoise = torch.compile(models["transformer"]) if args.compile else models["transformer"]
    start = 0
    if path.exists():
        state = torch.load(path, weights_only=True, map_location=device)
        models.load_state_dict(state["models"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["generator"].cpu())
        start = state["step"]
    empty = tokenize(tokenizer, [""]).short()
    begun, running = time.monotonic(), None
    progress = tqdm(range(start, args.steps), initial=start, total=args.steps, desc="transformer", mininterval=10)
    for step in progress:
        rows = torch.randint(len(codes), (args.batch_size,), generator=generator)
        target = codes[rows].long()
        dropped = torch.rand(args.batch_size, 1, generator=generator) < 0.1
        caption = torch.where(dropped, empty, text[rows]).long().to(device)
        ratio = torch.cos(torch.rand(args.batch_size, 1, generator=generator) * math.pi / 2)
        num_masked = (ratio * GRID**2).round().clamp(min=1)
        order = torch.rand(target.shape, generator=generator).argsort(1).argsort(1)
        masked = order < num_masked
        tokens = torch.where(masked, CODEBOOK_SIZE, target).view(-1, GRID, GRID).to(device)
        target, masked = target.to(device), masked.to(device)
        # On a CPU the fused attention's backward pass is the slowest part of the step at this size; the plain one is not.
        attention = sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else contextlib.nullcontext()
        with attention, torch.autocast(device.type, args.dtype, enabled=args.dtype != torch.float32):
            encoded = models["text_encoder"](caption, output_hidden_states=True)
            logits = denoise(
                tokens,
                encoder_hidden_states=encoded.hidden_states[-2],
                pooled_text_emb=encoded.text_embeds,
                micro_conds=micro_conditions(len(tokens), device),
            )
        logits = logits.flatten(2).transpose(1, 2)
        loss = F.cross_entropy(logits[masked].float(), target[masked])
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.learning_rate)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(models.parameters(), 1.0)
        optimizer.step()
        average.update_parameters(models)
        running = loss.item() if running is None else 0.99 * running + 0.01 * loss.item()
        if step % 100 == 0:
            progress.set_postfix_str(f"loss {running:.4f} nats per token")
        hours = (time.monotonic() - begun) / 3600
        if (step + 1) % 500 == 0 or step + 1 == args.steps:
            state = {"models": models.state_dict(), "average": average.state_dict(), "optimizer": optimizer.state_dict()}
            atomic_save(state | {"generator": generator.get_state(), "step": step + 1}, path)
            if (step + 1) % 1000 == 0:
                print(f"step {step + 1}: loss {running:.4f}, {hours:.2f} h", flush=True)
    return average.module["transformer"].eval(), average.module["text_encoder"].eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="folder of the checkpoints and of the result")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="of the autocast matrix products")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true", help="compile the transformer (needs a C++ compiler on a CPU)")
    parser.add_argument("--vq-steps", type=int, default=1500)
    parser.add_argument("--vq-batch-size", type=int, default=32)
    parser.add_argument("--pool-size", type=int, default=200_000, help="number of training images")
    parser.add_argument("--steps", type=int, default=7000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    args = parser.parse_args()
    args.dtype = getattr(torch, args.dtype)
    device = torch.device(args.device)
    args.output.mkdir(parents=True, exist_ok=True)

    tokenizer = build_tokenizer()
    book = fit_codebook(args.output, args.seed)
    codes, text = encode_pool(args, book, tokenizer)
    vqvae = train_vqvae(args, {name: tensor.to(device) for name, tensor in book.items()}, device)
    transformer, text_encoder = train_transformer(args, codes, text, tokenizer, device)
    pipe = AmusedPipeline(vqvae, tokenizer, text_encoder, transformer, AmusedScheduler(mask_token_id=CODEBOOK_SIZE))
    pipe.save_pretrained(args.output / "model")
    print(f"Wrote {args.output / 'model'}")


if __name__ == "__main__":
    main()
