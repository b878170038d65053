"""The flags of all commands. Nothing heavy is imported here: `--help` and a typo are answered at once."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .. import choices
from ..checks import LARGEST_INTEGER, LARGEST_NUMBER, check_integer, check_number, shown
from ..settings import SETTINGS, Setting

DTYPES = ("float32", "bfloat16", "float16")
DEFAULT_SAMPLERS = ("uniform", "halton", "confidence", "maskgit", "entropy", "margin", "lookum", "paper", "default")
DEFAULT_TEXT_SAMPLERS = ("confidence", "entropy", "margin", "maskgit", "uniform", "lookum", "info_gain", "paper")
MOST = 1_000_000
"""Of things that are counted in one call: more is a slip of the finger that would fill the memory."""


def integer(lowest: int, highest: int = LARGEST_INTEGER) -> Callable[[str], int]:
    """The type of a flag for whole numbers in [lowest, highest]."""

    def parse(text: str) -> int:
        try:
            value: int | str = int(text)
        except ValueError:
            value = text
        return _checked(check_integer, value, lowest, highest)

    return parse


def number(lowest: float, highest: float = LARGEST_NUMBER) -> Callable[[str], float]:
    """The type of a flag for finite numbers in [lowest, highest]."""

    def parse(text: str) -> float:
        try:
            value: float | str = float(text)
        except ValueError:
            value = text
        return _checked(check_number, value, lowest, highest)

    return parse


def _checked(check: Callable[..., None], value: Any, lowest: float, highest: float) -> Any:
    try:
        check("value", value, lowest, highest)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("`value` ").removesuffix(".")) from None
    return value


def words(text: str) -> str:
    """The type of a flag for text that a model reads."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"must be text in UTF-8, got {shown(text)}") from None
    return text


def name(text: str) -> str:
    """The type of a flag for a non-empty name."""
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError(f"must be a non-empty name, got {shown(text)}")
    return words(text)


def path(text: str) -> Path:
    """The type of a flag for a file or folder; the empty path, which would be the current folder, is a mistake."""
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError(f"must be a non-empty path, got {shown(text)}")
    return Path(text)


HIGHEST = {"num_candidates": 10_000}
"""Limits that are the command line's own: a slip of the finger would fill the memory."""


def _setting_type(name_of_setting: str, setting: Setting) -> Callable[[str], Any]:
    if setting.type is int:
        return integer(int(setting.lowest), HIGHEST.get(name_of_setting, LARGEST_INTEGER))
    if setting.type in (float, "temperature"):
        return number(setting.lowest, setting.highest)
    return name


def add_loading_flags(command: argparse.ArgumentParser) -> None:
    """What a published checkpoint needs beside its name."""
    text = "variant of the weights, such as fp16, or a MaskGIT's size (256_tiny to 384_large)"
    command.add_argument("--variant", type=name, help=text)
    text = "folder, file or Hub id of the image tokenizer, for checkpoints that are published without one"
    command.add_argument("--vqvae", type=name, help=text)


def add_model_flags(command: argparse.ArgumentParser) -> None:
    """The model and how to load it."""
    text = "'demo', a folder or a Hub id of any family that `load` knows (default: demo)"
    command.add_argument("--model", type=name, default="demo", help=text)
    add_loading_flags(command)


def add_device_flags(command: argparse.ArgumentParser, batch_size: int, unit: str = "image") -> None:
    """Device, dtype and batch size."""
    command.add_argument("--device", type=name, help="such as cpu, cuda or cuda:1 (default: cuda where there is one, else cpu)")
    command.add_argument("--dtype", default="float32", choices=DTYPES, help="of the weights (default: float32)")
    text = f"{unit}s decoded together (default: {batch_size})"
    command.add_argument("--batch-size", type=integer(1, MOST), default=batch_size, help=text)


def add_machine_flags(command: argparse.ArgumentParser, unit: str = "image") -> None:
    """Device, dtype, batch size and seed."""
    add_device_flags(command, 8, unit)
    command.add_argument("--seed", type=integer(0), default=0, help=f"of the first {unit} (default: 0)")


def add_seeds_flag(command: argparse.ArgumentParser, default: list[int]) -> None:
    """Seeds of runs that are told together."""
    text = f"(default: {' '.join(map(str, default))})"
    command.add_argument("--seeds", type=integer(0, 10**12), nargs="+", default=default, help=text)


def _add_lookahead_flag(command: argparse.ArgumentParser, default: int | None = None) -> None:
    text = "most states run through the model at once; lower it if memory runs out" + (
        f" (default: {default})" if default else ""
    )
    command.add_argument("--lookahead-batch-size", type=integer(1), default=default, help=text)


def _add_search_flags(command: argparse.ArgumentParser, unit: str) -> None:
    command.add_argument("--num-beams", type=integer(1, 1000), default=1, help="above 1: beam search with that many beams")
    text = f"above 1: the best of that many runs per {unit}"
    command.add_argument("--num-runs", type=integer(1, 1000), default=1, help=text)


def _add_size_flags(command: argparse.ArgumentParser) -> None:
    command.add_argument("--height", type=integer(1, 2**15), help="in pixels (default: the model's)")
    command.add_argument("--width", type=integer(1, 2**15), help="in pixels (default: the model's)")


def _add_image_call_flags(command: argparse.ArgumentParser) -> None:
    """Arguments of an image pipeline's call."""
    command.add_argument("--steps", type=integer(1), help="decoding steps (default: the model's, 12 for demo)")
    text = "strength of guidance (default: the model's, 1.2 for demo)"
    command.add_argument("--guidance-scale", type=number(-LARGEST_NUMBER), help=text)
    command.add_argument("--guidance-schedule", type=name, default="constant", help="constant, linear or cosine")
    command.add_argument("--negative-prompt", type=words, help="what to steer away from")
    _add_size_flags(command)
    _add_lookahead_flag(command)
    _add_search_flags(command, "image")


def add_sampler_flags(command: argparse.ArgumentParser, of_text: bool = False) -> None:
    """One flag per setting of the scheduler; those that only make sense for the other kind of model are taken and not shown."""
    group = command.add_argument_group("sampler", "settings of InfoGainScheduler; the model's where not given")
    group.add_argument("--preset", choices=tuple(choices.PRESETS), help="settings by name, which single flags override")
    other = "images" if of_text else "text"
    for setting_name, setting in SETTINGS.items():
        flag = "--" + setting_name.replace("_", "-")
        text = argparse.SUPPRESS if setting.only_for == other else setting.described
        if setting.type is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=text)
        else:
            nargs = "+" if setting.type == "temperature" else None
            group.add_argument(flag, type=_setting_type(setting_name, setting), nargs=nargs, help=text)


def add_prompt_flags(command: argparse.ArgumentParser) -> None:
    """Where the prompts of a run come from."""
    command.add_argument(
        "--prompts",
        type=name,
        default="demo",
        help="file: text with one prompt or class name per line, JSONL with the key 'prompt' (GenEval's "
        "evaluation_metadata.jsonl), JSON with a list or an id2label mapping; or 'demo' / 'demo-trained': captions of the demo "
        "world that the demo model was not / was trained on (default: demo)",
    )
    text = "sentence around every prompt, such as 'a photo of a {}'"
    command.add_argument("--prompt-template", type=words, default="{}", help=text)
    text = "the first so many prompts only (default: all; 500 captions for demo)"
    command.add_argument("--num-prompts", type=integer(1, choices.SEED_STRIDE), help=text)
    text = "of the demo world's captions (default: 1234)"
    command.add_argument("--prompts-seed", type=integer(0), default=1234, help=text)


def add_metric_flags(command: argparse.ArgumentParser) -> None:
    """What to measure, and by which networks."""
    group = command.add_argument_group("metrics")
    text = f"among {', '.join(choices.METRICS)} (default: what the demo world allows, else none)"
    group.add_argument("--metrics", type=name, nargs="*", help=text)
    text = "real images: a folder, ADM's statistics (.npz), or 'demo' for renderings of the prompts"
    group.add_argument("--reference", type=name, help=text)
    text = "of the distances (default: demo for the demo's prompts, else inception)"
    group.add_argument("--features", choices=choices.FEATURES, help=text)
    text = (
        "how images of any size come to that of the network: Pillow's filters with antialias on the largest centred square, or "
        "'network': by the network itself, as published FIDs have it (default: as --reference's statistics, else bicubic)"
    )
    group.add_argument("--resize", choices=choices.RESIZES, help=text)
    text = "file of FID's weights (default: torch-fidelity downloads them)"
    group.add_argument("--inception-weights", type=path, help=text)
    group.add_argument("--clip-model", type=name, help="folder or Hub id of a CLIP model")


def _add_prompts(command: argparse.ArgumentParser, text: str) -> None:
    command.add_argument("prompts", nargs="*", type=words, help=text)
    text = "text file with one prompt per line, or JSONL with the key 'prompt'"
    command.add_argument("--prompts-file", type=path, help=text)


def add_generate(command: argparse.ArgumentParser) -> None:
    """Flags of `generate`."""
    _add_prompts(command, "what to draw")
    add_model_flags(command)
    command.add_argument("--output", type=path, default=Path("outputs"), help="folder for the images (default: outputs)")
    command.add_argument("--grid", action="store_true", help="also write all images into one picture, grid.png")
    text = "images per prompt, with seeds one after the other"
    command.add_argument("--num-images", type=integer(1, choices.SEED_STRIDE), default=1, help=text)
    _add_image_call_flags(command)
    add_machine_flags(command)
    add_sampler_flags(command)


def add_demo(command: argparse.ArgumentParser) -> None:
    """Flags of `demo`."""
    command.add_argument("--output", type=path, default=Path("outputs"), help="folder for demo.png (default: outputs)")
    command.add_argument("--steps", type=integer(1, MOST), default=8, help="decoding steps (default: 8)")
    text = "held-out prompts behind each accuracy (default: 120)"
    command.add_argument("--num-prompts", type=integer(1, choices.SEED_STRIDE), default=120, help=text)
    add_machine_flags(command)


def add_exact(command: argparse.ArgumentParser) -> None:
    """Flags of `exact`."""
    command.add_argument("--num-samples", type=integer(1, MOST), default=200, help="per sampler and task (default: 200)")
    add_seeds_flag(command, [0])


def add_evaluate(command: argparse.ArgumentParser) -> None:
    """Flags of `evaluate`."""
    add_prompt_flags(command)
    add_model_flags(command)
    command.add_argument("--output", type=path, default=Path("outputs/evaluation"), help="folder (default: outputs/evaluation)")
    command.add_argument("--images", type=path, help="measure the images in this folder instead of making some")
    command.add_argument("--num-images", type=integer(1, choices.SEED_STRIDE), default=1, help="images per prompt (default: 1)")
    command.add_argument("--layout", default="plain", choices=choices.LAYOUTS, help="of the images (default: plain)")
    add_metric_flags(command)
    text = "file (.npz) for the statistics of the reference, or of the images if there is none, to be given as --reference later"
    command.add_argument("--save-statistics", type=path, metavar="FILE", help=text)
    _add_image_call_flags(command)
    add_machine_flags(command)
    add_sampler_flags(command)


def _add_samplers(command: argparse.ArgumentParser, default: tuple[str, ...]) -> None:
    command.add_argument(
        "--samplers",
        type=name,
        nargs="+",
        default=list(default),
        metavar="NAME[:KEY=VALUE,...]",
        help="samplers or presets (`diffusers-infogain samplers` lists them) with settings of the scheduler, or num_beams / "
        f"num_runs, such as maskgit:token_temperature=0.7 (default: {' '.join(default)})",
    )


def add_compare(command: argparse.ArgumentParser) -> None:
    """Flags of `compare`."""
    add_prompt_flags(command)
    add_metric_flags(command)
    add_model_flags(command)
    command.add_argument("--output", type=path, default=Path("outputs/comparison"), help="folder (default: outputs/comparison)")
    _add_samplers(command, DEFAULT_SAMPLERS)
    command.add_argument("--steps", type=integer(1), nargs="+", default=[8, 16], help="numbers of steps (default: 8 16)")
    text = "of those that look ahead (default: the preset's, else the model's)"
    command.add_argument("--num-candidates", type=integer(1, 10_000), nargs="+", help=text)
    text = "(default: the model's, 1.2 for demo)"
    command.add_argument("--guidance-scales", type=number(-LARGEST_NUMBER), nargs="+", help=text)
    add_seeds_flag(command, [0, 1, 2])
    command.add_argument("--num-images", type=integer(1, choices.SEED_STRIDE), default=1, help="images per prompt (default: 1)")
    command.add_argument("--everything", action="store_true", help="report all runs in the folder, not only those asked for")
    command.add_argument("--report", type=path, help="folder for table and plots (default: that of --output)")
    _add_size_flags(command)
    add_device_flags(command, batch_size=16)
    _add_lookahead_flag(command, default=16)


def _add_text_call_flags(command: argparse.ArgumentParser) -> None:
    _add_lookahead_flag(command)
    text = "of keys and values (default: exact if possible, else none)"
    command.add_argument("--cache", choices=choices.CACHES, help=text)


def add_decoding_flags(command: argparse.ArgumentParser) -> None:
    """How texts are decoded, whatever they are."""
    text = "decode blocks of so many tokens in turn (default: all, or the model's)"
    command.add_argument("--block-length", type=integer(1, MOST), help=text)
    text = "decoding steps in all (default: one token a step, or --tokens-per-step)"
    command.add_argument("--steps", type=integer(1), help=text)
    _add_text_call_flags(command)
    _add_search_flags(command, "block")


def add_text(command: argparse.ArgumentParser) -> None:
    """Flags of `text`."""
    _add_prompts(command, "what to answer")
    text = "'demo-text', a folder or a Hub id (default: demo-text)"
    command.add_argument("--model", type=name, default="demo-text", help=text)
    text = "file of JSON lines to write, or to go on with (default: print the texts)"
    command.add_argument("--output", type=path, help=text)
    command.add_argument("--chat", action="store_true", help="prompts are a user's turn in a chat")
    text = "texts per prompt, with seeds one after the other"
    command.add_argument("--num-texts", type=integer(1, choices.SEED_STRIDE), default=1, help=text)
    text = "(default: 128, 16 for demo-text, and 0, which only fills in masks, where prompts have any)"
    command.add_argument("--max-new-tokens", type=integer(0, MOST), help=text)
    add_decoding_flags(command)
    add_machine_flags(command, "text")
    add_sampler_flags(command, of_text=True)


def add_compare_text(command: argparse.ArgumentParser) -> None:
    """Flags of `compare-text`."""
    command.add_argument("--tasks", nargs="+", choices=choices.TEXT_TASKS, help="(default: all that can be asked so)")
    ask = (
        "infill: fill in the answer's template, for models of single characters such as demo-text; prompt: ask in words; chat: "
        "ask in words, as a user's turn (default: infill)"
    )
    command.add_argument("--ask", choices=("infill", "prompt", "chat"), default="infill", help=ask)
    shots = "solved problems before each, with --ask prompt or chat (default: 5 for sudoku, 3 for countdown, else none)"
    command.add_argument("--num-fewshot", type=integer(0, 1000), help=shots)
    text = "with --ask prompt or chat (default: 128)"
    command.add_argument("--max-new-tokens", type=integer(1, MOST), help=text)
    text = "with --ask prompt or chat: decode blocks of so many tokens in turn"
    command.add_argument("--block-length", type=integer(1, MOST), help=text)
    _add_samplers(command, DEFAULT_TEXT_SAMPLERS)
    text = "(default: 1 2 4)"
    command.add_argument("--tokens-per-step", type=integer(1), nargs="+", default=[1, 2, 4], help=text)
    add_seeds_flag(command, [0, 1, 2])
    command.add_argument("--num-problems", type=integer(1, choices.SEED_STRIDE), default=200, help="per task (default: 200)")
    command.add_argument("--problem-seed", type=integer(0), default=0, help="which problems (default: 0)")
    text = "'demo-text', a folder or a Hub id (default: demo-text)"
    command.add_argument("--model", type=name, default="demo-text", help=text)
    command.add_argument("--everything", action="store_true", help="report all runs in the output folder, not only these")
    command.add_argument("--plots", action="store_true", help="draw right against distinct answers, a picture for every task")
    _add_text_call_flags(command)
    command.add_argument("--output", type=path, default=Path("outputs/text"), help="folder (default: outputs/text)")
    add_device_flags(command, 50, "problem")


def add_lm_eval(command: argparse.ArgumentParser) -> None:
    """Flags of `lm-eval`."""
    text = "names of tasks, groups or tags that generate text"
    command.add_argument("--tasks", type=name, nargs="+", required=True, help=text)
    command.add_argument("--include-path", type=path, help="folder with further tasks (YAML)")
    command.add_argument("--model", type=name, required=True, help="a folder or a Hub id")
    command.add_argument("--output", type=path, default=Path("outputs/lm_eval"), help="folder (default: outputs/lm_eval)")
    command.add_argument("--limit", type=integer(1), help="the first so many problems of every task")
    command.add_argument("--num-fewshot", type=integer(0, 1000), help="examples in the prompt (default: the task's)")
    command.add_argument("--chat", action="store_true", help="prompts are chats, by the tokenizer's template")
    command.add_argument("--system-instruction", type=words, help="in front of every prompt")
    text = "settings over the task's own, such as max_gen_toks=512,do_sample=true,temperature=1"
    command.add_argument("--gen-kwargs", type=words, help=text)
    text = "new tokens where a task does not say (default: 256)"
    command.add_argument("--max-gen-toks", type=integer(1, MOST), default=256, help=text)
    greedy = "requests without sampling set the token temperature to 0 (default: they leave the sampler as it is)"
    command.add_argument("--greedy-tokens", action="store_true", help=greedy)
    code = "run the programs that the model writes, on this machine (HumanEval, MBPP); refused otherwise"
    command.add_argument("--allow-code-execution", action="store_true", help=code)
    add_decoding_flags(command)
    add_machine_flags(command, "text")
    add_sampler_flags(command, of_text=True)


def add_convert(command: argparse.ArgumentParser) -> None:
    """Flags of `convert`."""
    command.add_argument("source", type=name, help="folder, Hub id or weight file in its publisher's format")
    command.add_argument("target", type=path, help="folder to write; must not exist yet")
    command.add_argument("--text", action="store_true", help="of MMaDA the language model alone, to write text with")
    add_loading_flags(command)
    command.add_argument("--dtype", choices=DTYPES, help="of the weights (default: as stored)")
    text = "of a weight file (default: 5)"
    command.add_argument("--max-shard-size", type=number(1e-3, 1e6), default=5.0, metavar="GB", help=text)


def add_samplers(command: argparse.ArgumentParser) -> None:
    """`samplers` has no flags."""
