#!/usr/bin/env python
"""Measures what the approximate caches of text models cost in quality and save in time.

    OMP_NUM_THREADS=1 python examples/measure_text_caches.py
    OMP_NUM_THREADS=1 python examples/measure_text_caches.py --time

The first form writes products, equations and Sudoku grids with the bundled model, block by block behind a prompt, and checks
them. The second form times a larger model with random weights, of LLaDA's shape. Caches take turns, so that changes of the
machine's load affect all of them. Both print Markdown tables.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time

import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, PreTrainedTokenizerFast

from diffusers_infogain import InfoGainScheduler, InfoGainTextPipeline
from diffusers_infogain.evaluation import text_tasks
from diffusers_infogain.evaluation.samplers import parse_sampler
from diffusers_infogain.evaluation.statistics import clustered_mean
from diffusers_infogain.evaluation.tables import format_figure, markdown_table
from diffusers_infogain.models.llada import BidirectionalLlama
from diffusers_infogain.models.text_family import TextFamily

CACHES = ("none", "prefix", "dual")
BLOCK_LENGTHS = {"product": (5,), "equation": (4, 8), "sudoku": (4, 8)}


def problems_of(task: str, num: int, seed: int) -> list:
    """Problems of which nothing but the factors of a product is given, so that what is written follows a prompt."""
    generator = torch.Generator().manual_seed(seed)
    if task == "sudoku":
        return [text_tasks.SudokuProblem(text_tasks.MASK * 16)] * num
    return text_tasks.sample_multiplications(num, generator, given="factors" if task == "product" else "nothing")


def write(
    pipe: InfoGainTextPipeline, task: str, block_length: int, problems: list, seed: int, cache: str
) -> tuple[list[bool], list[int]]:
    """Which answers are right, and how many states each took."""
    templates = [problem.letter + problem.template for problem in problems]
    prompts = [template.partition(text_tasks.MASK)[0] if task == "product" else template[0] for template in templates]
    output = pipe(
        input_ids=[pipe.tokenizer(prompt).input_ids for prompt in prompts],
        max_new_tokens=len(templates[0]) - len(prompts[0]),
        block_length=block_length,
        generator=[torch.Generator().manual_seed(seed + index) for index in range(len(problems))],
        cache=cache,
    )
    texts = pipe.tokenizer.batch_decode(output.sequences)
    right = [text[0] == problem.letter and problem.check(text[1:]) for problem, text in zip(problems, texts, strict=True)]
    return right, output.trace.num_states.sum(0).tolist()


def quality(args: argparse.Namespace) -> None:
    """Prints how often each sampler is right with each cache, and the paired differences from no cache."""
    pipe = InfoGainTextPipeline.from_pretrained("demo-text")
    pipe.set_progress_bar_config(disable=True)
    rows = []
    for task, lengths in BLOCK_LENGTHS.items():
        for length, sampler in itertools.product(lengths, args.samplers):
            settings = parse_sampler(sampler, guided=False).scheduler
            pipe.scheduler = InfoGainScheduler(pipe.family.mask_token_id, **settings)
            found = {}
            for cache in CACHES:
                parts = [
                    write(pipe, task, length, problems_of(task, args.num, seed), 1_000_000 + 10_000 * seed, cache)
                    for seed in range(args.seeds)
                ]
                found[cache] = [list(itertools.chain(*lists)) for lists in zip(*parts, strict=True)]
            size = range(args.num * args.seeds)
            right, states = found["none"]
            cells = [format_figure(clustered_mean([float(own) for own in right], size), "right")]
            for cache in CACHES[1:]:
                less = [float(own) - float(none) for own, none in zip(found[cache][0], right, strict=True)]
                cells.append(format_figure(clustered_mean(less, size), "right"))
            rows.append([task, str(length), sampler, f"{statistics.mean(states):.1f}", *cells])
    header = ["task", "block", "sampler", "NFE", "right without a cache (%)", *(f"{cache} (points)" for cache in CACHES[1:])]
    print(markdown_table(header, rows))
    print(
        f"\nn = {args.num * args.seeds} ({args.seeds} seeds of {args.num}); the same problems and random numbers with each cache."
    )


def large_pipeline(args: argparse.Namespace) -> InfoGainTextPipeline:
    """A model of LLaDA's shape with random weights, and a tokenizer of numbers."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=args.vocab_size,
        hidden_size=args.hidden_size,
        intermediate_size=3 * args.hidden_size,
        num_hidden_layers=args.layers,
        num_attention_heads=max(args.hidden_size // 64, 1),
        tie_word_embeddings=False,
        is_causal=False,
    )
    mask = args.vocab_size - 1
    words = {str(i): i for i in range(args.vocab_size)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="0")), pad_token="0")
    model = BidirectionalLlama(config).to(args.device, getattr(torch, args.dtype)).eval()
    family = vars(TextFamily("llada", mask))
    pipe = InfoGainTextPipeline(model, tokenizer, InfoGainScheduler(mask_token_id=mask), family)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def speed(args: argparse.Namespace) -> None:
    """Prints the seconds of each sampler with each cache."""
    pipe = large_pipeline(args)
    prompts = torch.randint(
        0, args.vocab_size - 1, (args.batch_size, args.prompt_length), generator=torch.Generator().manual_seed(0)
    )
    rows = []
    for sampler in args.samplers:
        settings = parse_sampler(sampler, guided=False).scheduler | {"tokens_per_step": args.tokens_per_step}
        pipe.scheduler = InfoGainScheduler(pipe.family.mask_token_id, **settings)
        seconds: dict[tuple[str, bool], list[float]] = {(cache, pack): [] for cache in CACHES for pack in (False, True)}
        del seconds["none", True]
        for run in range(args.runs):
            for (cache, pack), values in seconds.items():
                generator = [torch.Generator().manual_seed(1000 * run + index) for index in range(args.batch_size)]
                call = {"max_new_tokens": args.new_tokens, "block_length": args.block_length, "generator": generator}
                begun = time.perf_counter()
                output = pipe(input_ids=prompts, cache=cache, pack_candidates=pack, stop_at_eos=False, **call)
                output.sequences.cpu()
                values.append(time.perf_counter() - begun)
        for (cache, pack), values in seconds.items():
            ratio = statistics.median(none / own for own, none in zip(values, seconds["none", False], strict=True))
            cells = [f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})", f"{ratio:.1f}"]
            rows.append([sampler, cache + (", packed" if pack else ""), *cells])
    print(markdown_table(["sampler", "cache", "seconds", "times as fast as none"], rows))
    millions = sum(parameter.numel() for parameter in pipe.model.parameters()) / 1e6
    print(
        f"\n{millions:.0f} M random parameters, {args.device}, {args.dtype}, {torch.get_num_threads()} threads; batches of "
        f"{args.batch_size}, prompts of {args.prompt_length}, {args.new_tokens} new tokens in blocks of {args.block_length}, "
        f"{args.tokens_per_step} tokens a step; medians (and ranges) of {args.runs} runs."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--samplers", nargs="+", default=["confidence", "text_fast", "text", "paper"])
    parser.add_argument("--num", type=int, default=250, help="problems of each task, per seed")
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--time", action="store_true", help="time a larger model instead")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--prompt-length", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--block-length", type=int, default=32)
    parser.add_argument("--tokens-per-step", type=int, default=4)
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocab-size", type=int, default=16384)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    (speed if args.time else quality)(args)


if __name__ == "__main__":
    main()
