#!/usr/bin/env python
"""Writes index.md, with the pictures and tables that examples/reproduce_photographs.sh has made so far.

    python examples/photographs/index.py outputs/photographs

The page and the folder pictures beside it can be copied into a documentation as they are. Each line of failed.txt, a family and
what was being made, is named with the last line of its log.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import shutil
from pathlib import Path
from typing import Any

import diffusers
import torch

import diffusers_infogain
from diffusers_infogain.files import read_json, save_text

PARTS = {"page": "Photographs", "fid": "FID"}


def machine() -> str:
    """The hardware and the versions of what ran on it."""
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        device = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    else:
        device = f"CPU ({platform.processor() or platform.machine()})"
    libraries = (
        f"diffusers_infogain {diffusers_infogain.__version__}, diffusers {diffusers.__version__}, torch {torch.__version__}"
    )
    return f"{device}; {libraries}; {datetime.date.today().isoformat()}"


def settings_of(folder: Path) -> str:
    """What all runs of a comparison share."""
    run = read_json(folder / "run.json")
    words = [f"`{run['model']}`"]
    options = ("variant", "vqvae", "text_encoder")
    words += [f"{name.replace('_', ' ')} `{run[name]}`" for name in options if name in run]
    words += [run["dtype"], f"batches of {run['batch_size']}", f"lookahead in batches of {run['lookahead_batch_size']}"]
    words += [f"{run['height']} x {run['width']} pixels"] if run["height"] else []
    words += [f"negative prompt “{run['negative_prompt']}”"] if "negative_prompt" in run else []
    return ", ".join(words) + f", {len(run['prompts'])} prompts"


def section(family: Path, pictures: Path) -> list[str]:
    """The part of the page about one family, and its pictures in the folder of pictures."""
    lines = [f"## {family.name}", ""]
    for part, title in PARTS.items():
        folder = family / part
        if not (folder / "table.md").exists():
            continue
        lines += [f"### {title} of {family.name}", "", f"{settings_of(folder)}.", ""]
        if (folder / "samples.jpg").exists():
            shutil.copyfile(folder / "samples.jpg", pictures / f"{family.name}.jpg")
            lines += [f"![The same prompts and seeds under several samplers](pictures/{family.name}.jpg)", ""]
        if part == "fid" and (folder / "pareto_rows.png").exists():
            shutil.copyfile(folder / "pareto_rows.png", pictures / f"{family.name}-fid.png")
            lines += [f"![FID against NFE](pictures/{family.name}-fid.png)", ""]
        lines += [(folder / "table.md").read_text(encoding="utf-8")]
    return lines if len(lines) > 2 else []


def failures(folder: Path) -> list[tuple[str, str]]:
    """What failed, and the last line of its log."""
    path = folder / "failed.txt"
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        log = folder / "logs" / f"{line.replace(' ', '-')}.log"
        said = log.read_text(encoding="utf-8", errors="replace").split("\n") if log.exists() else []
        found.append((line, next((text.strip() for text in reversed(said) if text.strip()), "nothing was said")))
    return found


def page(folder: Path) -> str:
    """The page as Markdown."""
    (folder / "pictures").mkdir(exist_ok=True)
    families: list[Any] = sorted({path.parent.parent for path in folder.glob("*/*/run.json")})
    lines = ["# Photographs", "", "Made by `examples/reproduce_photographs.sh` on this machine:", "", machine() + ".", ""]
    lines += ["Each picture has a row for every prompt and a column for every sampler. NFE are rows of the network.", ""]
    failed = failures(folder)
    if failed:
        lines += ["## What failed", "", *(f"- {name}: {said}" for name, said in failed), ""]
    for family in families:
        lines += section(family, folder / "pictures")
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=Path, help="what the script wrote to")
    folder = parser.parse_args().folder
    save_text(page(folder), folder / "index.md")
    print(f"Written: {folder / 'index.md'}")


if __name__ == "__main__":
    main()
