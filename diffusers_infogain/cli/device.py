"""Chooses among the devices of this machine, for `--device`."""

from __future__ import annotations

import torch

from ..processes import local_index


def usable_devices() -> list[str]:
    """The values of `--device` on this machine: "cpu", and each accelerator that torch can use, with and without its number."""
    names = ["cpu"]
    for backend, module in (("cuda", torch.cuda), ("xpu", torch.xpu), ("mps", torch.backends.mps)):
        if module.is_available():
            count = 1 if backend == "mps" else module.device_count()
            names += [backend, *(f"{backend}:{index}" for index in range(count))]
    return names


def choose_device(name: str | None) -> str:
    """The device of the flag; by default the first CUDA GPU, or the CPU if there is none.

    Raises:
        ValueError: If this machine does not have the device, listing those that it has.
    """
    usable = usable_devices()
    if name is None:
        return "cuda" if "cuda" in usable else "cpu"
    if name not in usable:
        without = " (this torch is built without CUDA)" if name.startswith("cuda") and not torch.backends.cuda.is_built() else ""
        raise ValueError(f"--device must be one of {', '.join(usable)} on this machine, got {name!r}{without}.")
    return name


def own_device(name: str) -> str:
    """The device that a process has for itself among those that a launcher started on its machine.

    An accelerator without a number becomes the one with the process's number; any other device stays, and is then shared.

    Raises:
        ValueError: If there are fewer accelerators than processes.
    """
    index = local_index()
    if index is None or name not in ("cuda", "xpu"):
        return name
    module = getattr(torch, name)
    if index >= module.device_count():
        raise ValueError(
            f"The launcher must start at most {module.device_count()} processes here, one for each device of --device {name}, "
            "got more: lower their number, or choose --device cpu."
        )
    module.set_device(index)
    return f"{name}:{index}"
