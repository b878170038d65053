#!/usr/bin/env python
"""Trains the text-to-image model that the package ships as "demo", and prints its accuracy.

    python examples/train_demo_model.py --output runs/demo

Takes somewhat over an hour on two CPU cores with bfloat16 instructions and `--compile` (without such instructions pass
`--dtype float32`), or minutes on a GPU; `torchrun --nproc-per-node 2` instead of `python` shares each batch of the transformer's
training among processes. The run is seeded, writes checkpoints, and resumes from them when started again. The result is a
repository in aMUSEd's format: VQModel, UVit2DModel, CLIPTextModelWithProjection, CLIPTokenizer.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import math
import time
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import PartialState
from diffusers import UVit2DModel, VQModel
from tokenizers.pre_tokenizers import ByteLevel
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm.auto import tqdm
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from diffusers_infogain import InfoGainPipeline, InfoGainScheduler
from diffusers_infogain.demo import checker, shapes
from diffusers_infogain.evaluation.runs import generate_images
from diffusers_infogain.files import replacing

# One code for each distinct 8 x 8 patch of the demo world.
CODEBOOK_SIZE = 193
PATCH = 8
LATENT_CHANNELS = 32
GUIDANCE_SCALE = 1.2
GRID = shapes.IMAGE_SIZE // PATCH
MAX_CAPTION_TOKENS = 16


def build_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer with one token per word of the demo world; other words are split into bytes.

    Byte pairs are merged until every word is one token, equally frequent ones in alphabetical order: the trainer of `tokenizers`
    breaks such ties differently from run to run, but a resumed training needs the same ids.
    """
    alphabet = sorted(ByteLevel.alphabet())
    words = sorted({word for caption in shapes.all_captions() for word in caption.text.split()})
    pieces = [[*word[:-1], word[-1] + "</w>"] for word in words]
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
    tokens = [*alphabet, *(symbol + "</w>" for symbol in alphabet), *map("".join, merges), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=MAX_CAPTION_TOKENS, pad_token="<|endoftext|>")


def build_vqvae() -> VQModel:
    return VQModel(
        block_out_channels=(24, 32, 48, 64),
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
        # Only the zero padding of the depthwise convolutions encodes positions: three of them reach every cell of an 8x8 grid.
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


def save_state(state: dict, path: Path) -> None:
    with replacing(path) as file:
        torch.save(state, file)


def learning_rate(step: int, steps: int, peak: float, warmup: int = 100) -> float:
    return peak * min(1.0, (step + 1) / warmup) * max(0.02, 0.5 * (1 + math.cos(math.pi * step / steps)))


def draw_images(num: int, generator: torch.Generator) -> tuple[torch.Tensor, list[shapes.Caption]]:
    """Images and their captions: one half from all categories, the other half from those that are hard to learn."""
    captions = shapes.sample_captions(num // 2, generator)
    captions += shapes.sample_captions(num - num // 2, generator, categories=("counting", "position", "attribute binding"))
    return shapes.render(shapes.sample_scenes(captions, generator)), captions


def patches(images: torch.Tensor) -> torch.Tensor:
    """The pixels that each token stands for: (B, 3, 64, 64) to (B, 8, 8, 192)."""
    b, c, h, w = images.shape
    cut = images.view(b, c, h // PATCH, PATCH, w // PATCH, PATCH)
    return cut.permute(0, 2, 4, 1, 3, 5).reshape(b, h // PATCH, w // PATCH, c * PATCH * PATCH)


def fit_codebook(folder: Path, seed: int) -> dict[str, torch.Tensor]:
    """The mean (192,) and principal axes (192, C) of the patches, and all distinct patches as `codebook` (codes, C).

    Since each code describes its own patch and nothing else in the image, no two codes stand for the same content, and the
    entropies that a sampler sees are about the scene.
    """
    path = folder / "codebook.pt"
    if path.exists():
        return torch.load(path, weights_only=True)
    generator = torch.Generator().manual_seed(seed)
    data = torch.cat([patches(draw_images(500, generator)[0]).flatten(0, 2) for _ in range(12)])
    distinct = torch.unique((data * 255).round(), dim=0) / 255
    if len(distinct) != CODEBOOK_SIZE:
        raise RuntimeError(f"The world has {len(distinct)} distinct patches; CODEBOOK_SIZE is {CODEBOOK_SIZE}.")
    mean = data.mean(0)
    axes = torch.linalg.eigh((distinct - mean).T @ (distinct - mean))[1][:, -LATENT_CHANNELS:]
    codebook = (distinct - mean) @ axes
    scale = codebook.std()
    state = {"mean": mean, "axes": axes / scale, "codebook": codebook / scale}
    save_state(state, path)
    return state


def coordinates(images: torch.Tensor, book: dict[str, torch.Tensor]) -> torch.Tensor:
    """The latents (B, 8, 8, C) that the encoder learns: the patches' principal coordinates."""
    return (patches(images) - book["mean"]) @ book["axes"]


def nearest_codes(latents: torch.Tensor, book: dict[str, torch.Tensor]) -> torch.Tensor:
    """The codes (B, 64) nearest to latents (B, 8, 8, C)."""
    return torch.cdist(latents.flatten(0, 2), book["codebook"]).argmin(1).view(len(latents), -1)


def train_vqvae(args: argparse.Namespace, book: dict[str, torch.Tensor], device: torch.device) -> VQModel:
    """Trains the encoder to predict the principal coordinates of each patch, and the decoder to invert the nearest codes."""
    path = args.output / "vqvae.pt"
    torch.manual_seed(args.seed)  # the initial weights; every later draw has its own generator
    vqvae = build_vqvae().to(device)
    vqvae.quantize.embedding.weight.data.copy_(book["codebook"])
    vqvae.quantize.requires_grad_(False)
    generator = torch.Generator().manual_seed(args.seed + 1)
    optimizer = torch.optim.AdamW(vqvae.parameters(), lr=1e-3, weight_decay=1e-4, fused=True)
    start = 0
    if path.exists():
        state = torch.load(path, weights_only=True, map_location="cpu")
        vqvae.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["generator"].cpu())
        start = state["step"]
    progress = tqdm(range(start, args.vq_steps), initial=start, total=args.vq_steps, desc="VQ", mininterval=10)
    for step in progress:
        images = draw_images(args.vq_batch_size, generator)[0].to(device)
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
        saving = (step + 1) % 500 == 0 or step + 1 == args.vq_steps
        if step % 50 == 0 or saving:
            right = nearest_codes(encoded.detach().permute(0, 2, 3, 1), book) == codes
            objects = right[codes != codes.flatten().mode().values].float().mean()
            line = f"l1 {F.l1_loss(decoded, images):.4f}, codes right {right.float().mean():.4f}, of objects {objects:.4f}"
            progress.set_postfix_str(line)
        if saving:
            print(f"VQ step {step + 1}: {line}", flush=True)
            state = {"model": vqvae.state_dict(), "optimizer": optimizer.state_dict(), "generator": generator.get_state()}
            save_state(state | {"step": step + 1}, path)
    return vqvae.requires_grad_(False).eval()


def encode_pool(args: argparse.Namespace, book: dict[str, torch.Tensor], tokenizer: CLIPTokenizer):
    """Tokens of the training images (N, 64) and of their captions (N, 16), and the captions' relations (N,).

    Computed once. Relations are indices of `shapes.RELATIONS`, -1 for none.
    """
    path = args.output / "pool.pt"
    if path.exists():
        state = torch.load(path, weights_only=True)
        return state["codes"], state["text"], state["relation"]
    generator = torch.Generator().manual_seed(args.seed + 2)
    codes, text, relation = [], [], []
    for _ in tqdm(range(0, args.pool_size, 500), desc="encode", mininterval=10):
        images, captions = draw_images(500, generator)
        codes.append(nearest_codes(coordinates(images, book), book).short())
        text.append(tokenize(tokenizer, [caption.text for caption in captions]).short())
        relation += [shapes.RELATIONS.index(caption.relation) if caption.relation else -1 for caption in captions]
    state = {"codes": torch.cat(codes), "text": torch.cat(text), "relation": torch.tensor(relation)}
    save_state(state, path)
    return state["codes"], state["text"], state["relation"]


def tokenize(tokenizer: CLIPTokenizer, texts: list[str]) -> torch.Tensor:
    return tokenizer(texts, padding="max_length", max_length=MAX_CAPTION_TOKENS, truncation=True, return_tensors="pt").input_ids


def micro_conditions(batch: int, device: torch.device) -> torch.Tensor:
    """AmusedPipeline's defaults: width, height, crop corner, aesthetic score."""
    return torch.tensor([[shapes.IMAGE_SIZE, shapes.IMAGE_SIZE, 0.0, 0.0, 6.0]], device=device).expand(batch, -1)


def average_gradients(parameters: list[torch.Tensor], processes: PartialState) -> None:
    """Averages the gradients over all processes, in place."""
    if processes.num_processes > 1:
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        torch.distributed.all_reduce(flat)
        parts = (flat / processes.num_processes).split([gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))


def lessons(relation: torch.Tensor) -> list[tuple[float, torch.Tensor, float]]:
    """The curriculum: until which share of the steps it shows which images of the pool, and the dropout of captions.

    The first eighth of the steps shows only "left of" and "above", the next sixteenth all relations, and the rest everything. A
    relation and its inverse differ in an interaction of three facts (which relation, which object, which place), any two of which
    are uninformative: trained on everything from the start, or on all relations, the model learned none. Once it knows where the
    first object of "left of" is, it learns the inverse in a hundred steps.
    """
    two_relations = (relation == shapes.RELATIONS.index("left of")) | (relation == shapes.RELATIONS.index("above"))
    return [
        (0.13, torch.where(two_relations)[0], 0.0),
        (0.19, torch.where(relation >= 0)[0], 0.0),
        (1.0, torch.arange(len(relation)), 0.1),
    ]


def draw_batch(
    size: int,
    pool: tuple[torch.Tensor, ...],
    lesson: torch.Tensor,
    dropout: float,
    empty: torch.Tensor,
    generator: torch.Generator,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens of images (B, 64), which of them are masked (B, 64), and the tokens of their captions (B, 16)."""
    codes, text, _ = pool
    images = lesson[torch.randint(len(lesson), (size,), generator=generator)]
    target = codes[images].long()
    dropped = torch.rand(size, 1, generator=generator) < dropout
    caption = torch.where(dropped, empty, text[images]).long()
    ratio = torch.cos(torch.rand(size, 1, generator=generator) * math.pi / 2)
    num_masked = (ratio * GRID**2).round().clamp(min=1)
    order = torch.rand(target.shape, generator=generator).argsort(1).argsort(1)
    return target, order < num_masked, caption


def train_transformer(args, pool: tuple[torch.Tensor, ...], tokenizer: CLIPTokenizer, processes: PartialState):
    """Masked-token prediction with MaskGIT's cosine mask ratios; one caption in ten is dropped for guidance (see `lessons`)."""
    path = args.output / "transformer.pt"
    device = processes.device
    torch.manual_seed(args.seed)  # the initial weights; every later draw has its own generator
    models = torch.nn.ModuleDict({"transformer": build_transformer(), "text_encoder": build_text_encoder(tokenizer)}).to(device)
    average = torch.optim.swa_utils.AveragedModel(models, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.998))
    # At the transformer's learning rate the text encoder's hidden states grow until a word's own state outweighs its context.
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in models[name].parameters() if (p.ndim > 1) == is_matrix], "weight_decay": decay, "scale": scale}
            for name, scale in (("transformer", 1.0), ("text_encoder", 0.2))
            for is_matrix, decay in ((True, 0.03), (False, 0.0))
        ],
        betas=(0.9, 0.98),
        fused=True,
    )
    generator = torch.Generator().manual_seed(args.seed + 3)
    denoise = torch.compile(models["transformer"]) if args.compile else models["transformer"]
    start = 0
    if path.exists():
        state = torch.load(path, weights_only=True, map_location="cpu")
        models.load_state_dict(state["models"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["generator"].cpu())
        start = state["step"]
    curriculum = lessons(pool[2])
    empty = tokenize(tokenizer, [""]).short()
    begun = time.monotonic()
    running = None
    quiet = not processes.is_main_process
    progress = tqdm(range(start, args.steps), initial=start, total=args.steps, desc="transformer", mininterval=10, disable=quiet)
    # Every process draws the whole batch and takes its share of it, so that a seed means the same for any number of processes.
    share = slice(processes.process_index, None, processes.num_processes)
    for step in progress:
        lesson, dropout = next((images, dropout) for end, images, dropout in curriculum if step < end * args.steps)
        batch = draw_batch(args.batch_size, pool, lesson, dropout, empty, generator)
        target, masked, caption = (tensor[share].to(device) for tensor in batch)
        tokens = torch.where(masked, CODEBOOK_SIZE, target).view(-1, GRID, GRID)
        # On a CPU the backward pass of fused attention is the slowest part of the step at this size; plain attention's is not.
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
            group["lr"] = group["scale"] * learning_rate(step, args.steps, args.learning_rate)
        optimizer.zero_grad()
        loss.backward()
        average_gradients(list(models.parameters()), processes)
        torch.nn.utils.clip_grad_norm_(models.parameters(), 1.0)
        optimizer.step()
        if step >= args.steps // 2:
            average.update_parameters(models)
        running = loss.item() if running is None else 0.99 * running + 0.01 * loss.item()
        if step % 100 == 0:
            progress.set_postfix_str(f"loss {running:.4f} nats per token")
        hours = (time.monotonic() - begun) / 3600
        if processes.is_main_process and ((step + 1) % 300 == 0 or step + 1 == args.steps):
            state = {"models": models.state_dict(), "average": average.state_dict(), "optimizer": optimizer.state_dict()}
            save_state(state | {"generator": generator.get_state(), "step": step + 1}, path)
            if (step + 1) % 900 == 0:
                print(f"step {step + 1}: loss {running:.4f}, {hours:.2f} h", flush=True)
    return average.module["transformer"].eval(), average.module["text_encoder"].eval()


def report(folder: Path, device: str, num_images: int) -> None:
    """Prints the share of reconstructed held-out images, and of images from held-out prompts, that show what they should."""
    pipe = InfoGainPipeline.from_pretrained(folder).to(device)
    captions = shapes.sample_captions(num_images, torch.Generator().manual_seed(1), held_out=True)

    def share(images: list) -> str:
        right = [checker.check_image(image, caption).holds for image, caption in zip(images, captions, strict=True)]
        groups = {c: [r for r, caption in zip(right, captions, strict=True) if caption.category == c] for c in shapes.CATEGORIES}
        each = ", ".join(f"{category} {sum(group)} of {len(group)}" for category, group in groups.items() if group)
        return f"{sum(right)} of {len(right)} right ({each})"

    rendered = shapes.render(shapes.sample_scenes(captions, torch.Generator().manual_seed(2))).to(device)
    with torch.no_grad():
        codes = pipe.vqvae.quantize(pipe.vqvae.encode(rendered).latents)[2][2].view(-1, GRID, GRID)
        decoded = pipe.vqvae.decode(codes, force_not_quantize=True, shape=(*codes.shape, LATENT_CHANNELS)).sample.clamp(0, 1)
    print(f"reconstructions: {share(list(decoded))}")
    prompts, seeds = [caption.text for caption in captions], list(range(num_images))
    call = {"num_inference_steps": 16}
    for sampler in ("confidence", "maskgit"):
        pipe.scheduler = InfoGainScheduler.from_config(pipe.scheduler.config, sampler=sampler)
        images = generate_images(pipe, prompts, seeds, 20, sampler, **call).images
        print(f"held-out prompts, sampler {sampler}, 16 steps, guidance {pipe.default_guidance_scale}: {share(images)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="folder of the checkpoints and of the result")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="of the autocast matrix products")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true", help="compile the transformer (needs a C++ compiler on a CPU)")
    parser.add_argument("--vq-steps", type=int, default=2000)
    parser.add_argument("--vq-batch-size", type=int, default=32)
    parser.add_argument("--pool-size", type=int, default=200_000, help="number of training images")
    parser.add_argument("--steps", type=int, default=3600)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--report-images", type=int, default=300, help="held-out prompts behind the printed accuracy")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    args = parser.parse_args()
    args.dtype = getattr(torch, args.dtype)
    processes = PartialState(cpu=args.device == "cpu")
    args.output.mkdir(parents=True, exist_ok=True)

    tokenizer = build_tokenizer()
    with processes.main_process_first():  # the others find the finished files
        book = fit_codebook(args.output, args.seed)
        pool = encode_pool(args, book, tokenizer)
    transformer, text_encoder = train_transformer(args, pool, tokenizer, processes)
    if not processes.is_main_process:
        return
    device = processes.device
    vqvae = train_vqvae(args, {name: tensor.to(device) for name, tensor in book.items()}, device)
    scheduler = InfoGainScheduler(mask_token_id=CODEBOOK_SIZE)
    pipe = InfoGainPipeline(vqvae, tokenizer, text_encoder, transformer, scheduler, default_guidance_scale=GUIDANCE_SCALE)
    pipe.save_pretrained(args.output / "model")
    print(f"Wrote {args.output / 'model'}")
    report(args.output / "model", args.device, args.report_images)


if __name__ == "__main__":
    main()
