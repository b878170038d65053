#!/usr/bin/env python
"""Measures the time that lookahead costs when text is decoded in blocks with an exact cache, and what batching gains.

    python examples/benchmark_text_time.py --batch-sizes 1 8

The model is block-causal, of SDAR's shape, with random weights. `--sharpness` scales its logits, and so the number of steps for
which the confidence threshold skips the lookahead. Samplers take turns, so that changes of the machine's load affect all of them.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import asdict

import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from diffusers_infogain import InfoGainScheduler, InfoGainTextPipeline
from diffusers_infogain.models.text_family import TextFamily


def make_pipeline(args: argparse.Namespace, sharpness: float) -> InfoGainTextPipeline:
    """A model with random weights and a tokenizer of numbers."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=args.vocab_size,
        hidden_size=args.hidden_size,
        intermediate_size=3 * args.hidden_size,
        num_hidden_layers=args.layers,
        num_attention_heads=max(args.hidden_size // 64, 1),
        num_key_value_heads=max(args.hidden_size // 128, 1),
        head_dim=64,
        tie_word_embeddings=False,
    )
    model = Qwen3ForCausalLM(config).to(args.device, getattr(torch, args.dtype)).eval()
    model.lm_head.weight.data *= sharpness
    mask = args.vocab_size - 1
    words = {str(i): i for i in range(args.vocab_size)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="0")), pad_token="0")
    family = TextFamily("sdar", mask, attention="block_causal", block_length=args.block_length)
    pipe = InfoGainTextPipeline(model, tokenizer, InfoGainScheduler(mask_token_id=mask), asdict(family))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def time_samplers(args: argparse.Namespace, pipe: InfoGainTextPipeline, samplers: dict[str, dict], size: int) -> None:
    """Prints the time of every sampler with every cache for batches of this size."""
    prompts = torch.randint(0, args.vocab_size - 1, (size, args.block_length), generator=torch.Generator().manual_seed(0))
    seconds: dict[tuple[str, str], list[float]] = {(name, cache): [] for name in samplers for cache in args.cache}
    costs = {}
    for run in range(args.runs + 1):
        for name, cache in seconds:
            settings = {"entropy_bound": 0, **samplers[name]}
            pipe.scheduler = InfoGainScheduler.from_config({"mask_token_id": args.vocab_size - 1}, **settings)
            generators = [torch.Generator().manual_seed(1000 * run + index) for index in range(size)]
            start = time.perf_counter()
            output = pipe(input_ids=prompts, max_new_tokens=args.new_tokens, generator=generators, cache=cache)
            output.sequences.cpu()
            if run > 0:  # the first run warms up
                seconds[name, cache].append(time.perf_counter() - start)
            trace = output.trace
            lookaheads = (trace.objective.isfinite().sum(-1) > 1).double().sum(0).mean()
            costs[name, cache] = f"{trace.num_evaluations.sum(0).double().mean():.0f} NFE, {lookaheads:.0f} steps with lookahead"
    for (name, cache), values in seconds.items():
        ratio = statistics.median(own / greedy for own, greedy in zip(values, seconds["confidence", cache], strict=True))
        median = statistics.median(values)
        print(
            f"  batch {size}, {name}, cache {cache}: {median:.2f} s ({min(values):.2f} to {max(values):.2f}), "
            f"{size * args.new_tokens / median:.0f} tokens/s, {ratio:.2f} times confidence; per text: {costs[name, cache]}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1])
    parser.add_argument("--num-candidates", type=int, default=8)
    parser.add_argument("--confidence-threshold", type=float, default=0.8)
    parser.add_argument("--sharpness", type=float, nargs="+", default=[8.0, 16.0, 32.0])
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--block-length", type=int, default=16)
    parser.add_argument("--cache", nargs="+", default=["exact"])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--hidden-size", type=int, default=768)
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--vocab-size", type=int, default=16384)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    samplers = {
        "confidence": {"sampler": "confidence", "token_temperature": 0.7},
        "info_gain": {
            "sampler": "info_gain",
            "certainty": "confidence",
            "num_candidates": args.num_candidates,
            "confidence_threshold": args.confidence_threshold,
            "token_temperature": 0.7,
            "position_temperature": 0.1,
            "gain_reduction": "sum",
        },
    }
    for sharpness in args.sharpness:
        pipe = make_pipeline(args, sharpness)
        count = sum(parameter.numel() for parameter in pipe.model.parameters()) / 1e6
        print(
            f"{count:.1f} M parameters, {args.device}, {args.dtype}, {torch.get_num_threads()} threads, sharpness {sharpness:g}"
        )
        for size in args.batch_sizes:
            time_samplers(args, pipe, samplers, size)


if __name__ == "__main__":
    main()
