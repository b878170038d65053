#!/usr/bin/env python
"""Measures the share of the decoding time that is spent on decisions, that is, outside the transformer.

    python examples/benchmark_decision_time.py --num-candidates 8 --batch-size 8

The transformer's seconds are measured within the same runs. Images are not decoded to pixels.
"""

from __future__ import annotations

import argparse
import time

import torch

from diffusers_infogain import InfoGainPipeline, InfoGainScheduler


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--num-candidates", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    pipe = InfoGainPipeline.from_pretrained("demo").to(args.device)
    pipe.set_progress_bar_config(disable=True)
    # Without an entropy bound every run takes all steps, so that runs are comparable.
    settings = {"num_candidates": args.num_candidates, "certainty": "maskgit", "entropy_bound": 0, "lazy_threshold": None}
    pipe.scheduler = InfoGainScheduler.from_config(pipe.scheduler.config, **settings)
    spent = [0.0]
    started = [0.0]

    def now() -> float:
        if args.device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter()

    pipe.transformer.register_forward_pre_hook(lambda *_: started.__setitem__(0, now()))
    pipe.transformer.register_forward_hook(lambda *_: spent.__setitem__(0, spent[0] + now() - started[0]))
    embeds = dict(
        zip(
            ("prompt_embeds", "encoder_hidden_states", "negative_prompt_embeds", "negative_encoder_hidden_states"),
            (tensor.detach() for tensor in pipe.encode_prompt(["a red circle"] * args.batch_size)),
            strict=True,
        )
    )
    shares, seconds = [], []
    for run in range(args.runs + 1):
        spent[0], start = 0.0, now()
        output = pipe(
            **embeds,
            num_inference_steps=args.steps,
            generator=torch.Generator().manual_seed(run),
            output_type="latent",
        )
        if run > 0:  # the first run warms up
            seconds.append(now() - start)
            shares.append(1 - spent[0] / seconds[-1])
    shares, seconds = torch.tensor(shares), torch.tensor(seconds)
    states, evaluations = (counts.sum(0).double().mean() for counts in (output.trace.num_states, output.trace.num_evaluations))
    print(
        f"{args.runs} runs of {args.batch_size} images, {args.steps} steps, {args.num_candidates} candidates, "
        f"{states:.0f} states and {evaluations:.1f} NFE per image: {seconds.mean():.3f} ± {seconds.std():.3f} s, of which "
        f"{100 * shares.mean():.1f} ± {100 * shares.std():.1f} % outside the transformer"
    )


if __name__ == "__main__":
    main()
