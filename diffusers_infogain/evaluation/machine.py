"""The machine that figures were measured on, and the memory that a piece of work takes there."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from .. import __version__

_CLEAR_PEAK = Path("/proc/self/clear_refs")  # writing 5 resets the peak of the resident memory
_MB = 1e6


def describe_machine(device: str, dtype: str, compiled: bool = False) -> dict[str, Any]:
    """What speed depends on besides the model: the processor, threads, versions, the type of the weights, and compiling."""
    kind = torch.device(device).type
    return {
        "device": device,
        "name": torch.cuda.get_device_name(device) if kind == "cuda" else _processor(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "dtype": dtype,
        "compiled": compiled,
        "platform": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
        "diffusers_infogain": __version__,
    }


def machine_line(machine: dict[str, Any]) -> str:
    """The machine in a line, for below a table."""
    threads = f"{machine['threads']} thread{'s' * (machine['threads'] != 1)} of {machine['cores']} cores"
    place = machine["name"] if machine["name"] == machine["processor"] else f"{machine['name']} ({machine['processor']})"
    kind = f"{machine['dtype']}{', compiled' * machine['compiled']}"
    versions = ", ".join(f"{name} {machine[name]}" for name in ("torch", "diffusers", "transformers", "diffusers_infogain"))
    return f"{place}, {threads}, {machine['platform']}, {kind}; Python {machine['python']}, {versions}."


def _processor() -> str:
    """The name of the processor, as its maker gives it where that can be read."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(filter(None, named), "") or platform.processor() or platform.machine()


def wait_for(device: str | torch.device) -> None:
    """Waits until a CUDA GPU has done all that it was given; other devices are not waited for."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


class PeakMemory:
    """The most memory in use since it was made: torch's on a CUDA GPU, else the resident set of the process (Linux only)."""

    def __init__(self, device: str | torch.device):
        self.device = torch.device(device)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        elif _CLEAR_PEAK.exists():
            _CLEAR_PEAK.write_text("5")
        self.start = self.peak()

    def peak(self) -> int | None:
        """In bytes, so far; None where it cannot be told."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        if not _CLEAR_PEAK.exists():
            return None
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return 1024 * int(status["VmHWM"].split()[0])

    def megabytes(self) -> float | None:
        """The peak so far."""
        peak = self.peak()
        return None if peak is None else peak / _MB

    def megabytes_above_start(self) -> float | None:
        """The peak beyond what was in use at the start."""
        peak = self.peak()
        return None if peak is None or self.start is None else (peak - self.start) / _MB
