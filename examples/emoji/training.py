"""Training in steps that can be killed and goes on where it was."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from diffusers_infogain.files import replacing

# How often a checkpoint is written.
SAVE_SECONDS = 180


def learning_rate(step: int, steps: int, peak: float, warmup: int = 200) -> float:
    """Linear warm-up, then half a cosine down to a fiftieth of the peak."""
    return peak * min(1.0, (step + 1) / warmup) * max(0.02, 0.5 * (1 + math.cos(math.pi * step / steps)))


def run_steps(
    path: Path,
    steps: int,
    parts: Mapping[str, Any],
    generator: torch.Generator,
    step: Callable[[int], Mapping[str, float]],
    save_seconds: float = SAVE_SECONDS,
) -> bool:
    """Calls `step` for each number below `steps`, from the checkpoint at `path` on if there is one.

    With equal arguments the result is the same however often the training was killed: all that is drawn comes from `generator`.

    Args:
        parts: What a checkpoint holds: anything with `state_dict` and `load_state_dict`.
        step: Takes the number of the step, and gives the figures to show.

    Returns:
        Whether a step was made.
    """
    start, shown, seconds = 0, {}, 0.0
    if path.exists():
        state = torch.load(path, weights_only=True, map_location="cpu")
        for name, part in parts.items():
            part.load_state_dict(state[name])
        generator.set_state(state["generator"])
        start, seconds = state["step"], state["seconds"]
    begun = saved = time.monotonic()
    bar = tqdm(range(start, steps), initial=start, total=steps, desc=path.stem, mininterval=10)
    for number in bar:
        for key, value in step(number).items():
            shown[key] = value if key not in shown else 0.98 * shown[key] + 0.02 * value
        now = time.monotonic()
        if now - saved > save_seconds or number + 1 == steps:
            line = ", ".join(f"{key} {value:.4f}" for key, value in shown.items())
            bar.set_postfix_str(line)
            total = seconds + now - begun
            print(f"{path.stem} {number + 1}: {line}, {total / 3600:.2f} h", flush=True)
            state = {name: part.state_dict() for name, part in parts.items()}
            with replacing(path) as file:
                torch.save(state | {"generator": generator.get_state(), "step": number + 1, "seconds": total}, file)
            saved = time.monotonic()
    return start < steps


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Sets the rate of every group, times the group's own `scale`."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("scale", 1.0)
