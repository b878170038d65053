"""Which devices this machine has, for `--device`."""

from __future__ import annotations

import torch


def usable_devices() -> list[str]:
    """What `--device` takes here: "cpu", and every accelerator that torch can run on, with and without its number."""
    names = ["cpu"]
    for kind, module in (("cuda", torch.cuda), ("xpu", torch.xpu), ("mps", torch.backends.mps)):
        if module.is_available():
            count = 1 if kind == "mps" else module.device_count()
            names += [kind, *(f"{kind}:{index}" for index in range(count))]
    return names


def choose_device(name: str | None) -> str:
    """The device that a flag names; by default a GPU of CUDA where there is one, else the CPU.

    Raises:
        ValueError: If this machine does not have it, saying what it has.
    """
    usable = usable_devices()
    if name is None:
        return "cuda" if "cuda" in usable else "cpu"
    if name not in usable:
        without = " (this torch is built without CUDA)" if name.startswith("cuda") and not torch.backends.cuda.is_built() else ""
        raise ValueError(f"--device must be one of {', '.join(usable)} on this machine, got {name!r}{without}.")
    return name
