"""The flags of all commands.

They are apart from the commands' actions because nothing heavy may be imported here: `--help` and typing errors are answered
before torch is loaded.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from .. import choices
from ..checks import LARGEST_INTEGER, LARGEST_NUMBER, check_integer, check_number, shown
from ..settings import SETTINGS, Setting

Parser = argparse.ArgumentParser

DTYPES = ("float32", "bfloat16", "float16")
DEFAULT_SAMPLERS = ("uniform", "halton", "confidence", "maskgit", "entropy", "margin", "lookum", "paper", "default")
MOST = 1_000_000
"""The largest count of anything in one call: a larger one is a typing error that would fill the memory."""


def integer(lowest: int, highest: int = LARGEST_INTEGER) -> Callable[[str], int]:
    """The type of a flag for whole numbers in [lowest, highest]."""
    return partial(_number, int, check_integer, lowest, highest)


def number(lowest: float, highest: float = LARGEST_NUMBER) -> Callable[[str], float]:
    """The type of a flag for finite numbers in [lowest, highest]."""
    return partial(_number, float, check_number, lowest, highest)


def _number(convert: type, check: Callable[..., None], lowest: float, highest: float, text: str) -> Any:
    try:
        value = convert(text)
    except ValueError:
        value = text  # which the check refuses, in its own words
    try:
        check("value", value, lowest, highest)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("`value` ").removesuffix(".")) from None
    return value


def utf8(text: str) -> str:
    """The type of a flag for text that a model reads."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"must be text in UTF-8, got {shown(text)}") from None
    return text


def nonempty(text: str) -> str:
    """The type of a flag for a name."""
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError(f"must be a non-empty name, got {shown(text)}")
    return utf8(text)


def path(text: str) -> Path:
    """The type of a flag for a file or folder; the empty path, which would be the current folder, is refused."""
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError(f"must be a non-empty path, got {shown(text)}")
    return Path(text)


HIGHEST = {"num_candidates": 10_000}
"""Bounds that the scheduler does not have; larger values are typing errors that would fill the memory."""


def _setting_type(setting_name: str, setting: Setting) -> Callable[[str], Any]:
    if setting.type is int:
        return integer(int(setting.lowest), HIGHEST.get(setting_name, LARGEST_INTEGER))
    if setting.type in (float, "temperature"):
        return number(setting.lowest, setting.highest)
    return nonempty


def _add(command: Any, flag: str, kind: Callable[[str], Any], text: str, default: Any = None, **more: Any) -> None:
    """Adds a flag whose help names its default, unless that is None."""
    if default is not None:
        named = " ".join(map(str, default)) if isinstance(default, list) else default
        text = f"{text} (default: {named})".strip()
    command.add_argument(flag, type=kind, default=default, help=text, **more)


def _add_loading_flags(command: Parser) -> None:
    text = "variant of the weights, such as fp16, or a MaskGIT's size (256_tiny to 384_large)"
    _add(command, "--variant", nonempty, text)
    text = "folder, file or Hub id of the image tokenizer, for checkpoints that are published without one"
    _add(command, "--vqvae", nonempty, text)
    text = "folder or Hub id of another text encoder than the checkpoint's (Meissonic, MaskGen)"
    _add(command, "--text-encoder", nonempty, text)
    text = "folder or Hub id of Phi-1.5, whose tokenizer and config.json Show-o needs"
    _add(command, "--language-model", nonempty, text)


def _add_model_flags(command: Parser) -> None:
    _add(command, "--model", nonempty, "'demo', a folder or a Hub id of any family that `load` knows", "demo")
    _add_loading_flags(command)


def _add_text_model_flag(command: Parser) -> None:
    _add(command, "--model", nonempty, "'demo-text', a folder or a Hub id", "demo-text")


def _add_device_flags(command: Parser, batch_size: int | None, unit: str = "image") -> None:
    _add(command, "--device", nonempty, "such as cpu, cuda or cuda:1 (default: cuda if there is one, else cpu)")
    command.add_argument("--dtype", default="float32", choices=DTYPES, help="of the weights (default: float32)")
    kinds = ", ".join(f"{name} ({what})" for name, what in choices.QUANTIZATIONS.items())
    text = f"keep the weights of the model that predicts tokens in few bits, and compute in --dtype, best bfloat16: {kinds}"
    command.add_argument("--quantize", choices=tuple(choices.QUANTIZATIONS), help=text)
    text = "spread the layers of each model over GPUs, memory and disk (auto, sequential), or whole models over GPUs (balanced)"
    command.add_argument("--device-map", choices=choices.DEVICE_MAPS, help=text)
    text = "keep the parts of the model in the computer's memory and bring each to the GPU while it works"
    command.add_argument("--offload", action="store_true", help=text)
    text = "compile model and decisions with torch.compile: minutes of waiting at first, worth it for many images or texts"
    command.add_argument("--compile", action="store_true", help=text)
    if batch_size is not None:
        _add(command, "--batch-size", integer(1, MOST), f"{unit}s decoded together", batch_size)


def _add_machine_flags(command: Parser, unit: str = "image") -> None:
    """Device, dtype, batch size and seed."""
    _add_device_flags(command, 8, unit)
    _add(command, "--seed", integer(0), f"of the first {unit}", 0)


def _add_seeds_flag(command: Parser, default: list[int]) -> None:
    _add(command, "--seeds", integer(0, 10**12), "of the runs that are averaged", default, nargs="+")


def _add_output_flag(command: Parser, folder: str, text: str = "folder") -> None:
    _add(command, "--output", path, text, Path(folder))


def _add_count_flag(command: Parser, flag: str, text: str, default: int = 1) -> None:
    """A number of images, texts or problems: as many as there are seeds between two runs at most."""
    _add(command, flag, integer(1, choices.SEED_STRIDE), text, default)


def _add_lookahead_flag(command: Parser, default: int | None = None) -> None:
    text = "most states run through the model at once; lower it if memory runs out"
    _add(command, "--lookahead-batch-size", integer(1), text, default)


def _add_search_flags(command: Parser, unit: str) -> None:
    _add(command, "--num-beams", integer(1, 1000), "above 1: beam search with that many beams", 1)
    _add(command, "--num-runs", integer(1, 1000), f"above 1: the best of that many runs per {unit}", 1)


def _add_size_flags(command: Parser) -> None:
    for flag in ("--height", "--width"):
        _add(command, flag, integer(1, 2**15), "in pixels (default: the model's)")


def _add_approximate_cache_flag(command: Parser) -> None:
    text = "reuse parts of earlier rows, which changes the images: context, context:0.25, ml_cache or ml_cache:0.9:0.3:5"
    _add(command, "--approximate-cache", nonempty, text)


def _add_image_call_flags(command: Parser) -> None:
    """Arguments of an image pipeline's call."""
    _add(command, "--steps", integer(1), "decoding steps (default: the model's, 12 for demo)")
    text = "strength of guidance (default: the model's, 1.2 for demo)"
    _add(command, "--guidance-scale", number(-LARGEST_NUMBER), text)
    text = "constant, linear or cosine, or one of TiTok and MaskGen, as in titok_linear (default: the model's, constant for demo)"
    _add(command, "--guidance-schedule", nonempty, text)
    text = "two shares, start and stop: guide only while at least start and less than stop of the image is decoded"
    _add(command, "--guidance-interval", number(0, 1), text, [0.0, 1.0], nargs="+")
    text = "compare candidates by their logits with the prompt alone, so that only the chosen one takes a negative row"
    command.add_argument("--unguided-lookahead", action="store_true", help=text)
    _add(command, "--negative-prompt", utf8, "what to steer away from")
    _add_approximate_cache_flag(command)
    _add_size_flags(command)
    _add_lookahead_flag(command)
    _add_search_flags(command, "image")


def outpaint(text: str) -> dict[str, int]:
    """The type of a flag for pixels by side, such as left=128,top=64."""
    sides: dict[str, int] = {}
    for part in text.split(","):
        side, _, pixels = part.partition("=")
        if side not in choices.SIDES or side in sides or not pixels.isascii() or not pixels.isdigit() or len(pixels) > 6:
            allowed = f"pixels by side ({', '.join(choices.SIDES)}), such as left=128,top=64"
            raise argparse.ArgumentTypeError(f"must be {allowed}, got {shown(text)}")
        sides[side] = int(pixels)
    return sides


def _add_editing_flags(command: Parser) -> None:
    group = command.add_argument_group("editing", "of an image, for all prompts")
    _add(group, "--image", path, "file of an image to edit; without --mask, --outpaint or --task, image to image")
    text = "file of a mask as large as the image: what is white is decoded anew, and all other pixels stay"
    _add(group, "--mask", path, text)
    text = "share of the (masked) tokens that is decoded anew (default: 1 with --mask, else 0.5)"
    _add(group, "--strength", number(0, 1), text)
    _add(group, "--outpaint", outpaint, "pixels to add by side, in multiples of a token's", metavar="left=128,top=64,...")
    _add(group, "--mask-coverage", number(0, 1), "decode tokens of which more than this share is masked", 0.0)
    _add(group, "--mask-blur", number(0, choices.MOST_BLUR), "pixels of a soft seam around the mask", 0.0)


def _add_task_flags(command: Parser) -> None:
    group = command.add_argument_group("images in the prompt", "of Lumina-DiMOO, which sees them")
    text = "what to do with --image: image_editing, control_generation, subject_generation, style_transfer, dense_prediction, ..."
    _add(group, "--task", nonempty, text)
    _add(group, "--style-image", path, "file of the image whose style --image gets, with --task style_transfer")
    text = "strength of guidance towards --image, with --task (default: the model's)"
    _add(group, "--image-guidance-scale", number(-LARGEST_NUMBER), text)


def add_sampler_flags(command: Parser, of_text: bool = False) -> None:
    """One flag per setting of the scheduler; those for the other modality only are accepted but not shown."""
    group = command.add_argument_group("sampler", "settings of InfoGainScheduler (default: the model's)")
    group.add_argument("--preset", choices=tuple(choices.PRESETS), help="a set of settings, which single flags override")
    other = "images" if of_text else "text"
    for setting_name, setting in SETTINGS.items():
        flag = "--" + setting_name.replace("_", "-")
        text = argparse.SUPPRESS if setting.only_for == other else setting.described
        if setting.type is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=text)
        else:
            nargs = "+" if setting.type == "temperature" else None
            group.add_argument(flag, type=_setting_type(setting_name, setting), nargs=nargs, help=text)


def _add_prompt_arguments(command: Parser, text: str) -> None:
    """Prompts on the command line or in a file."""
    command.add_argument("prompts", nargs="*", type=utf8, help=text)
    _add(command, "--prompts-file", path, "text file with one prompt per line, or JSONL with the key 'prompt'")


def _add_prompt_set_flags(command: Parser) -> None:
    """The prompts of an evaluation."""
    text = (
        "file: text with one prompt or class name per line, JSONL with the key 'prompt' (GenEval's evaluation_metadata.jsonl), "
        "JSON with a list or an id2label mapping; a folder of .txt files with a prompt "
        "each (DPG-Bench's); or captions of the demo world: 'demo-trained', which the demo model was "
        "trained on, 'demo', which it was not, or a third of those: 'demo-choose' to choose settings on, 'demo-report' or "
        "'demo-final'"
    )
    _add(command, "--prompts", nonempty, text, "demo")
    _add(command, "--prompt-template", utf8, "sentence around every prompt, such as 'a photo of a {}'", "{}")
    text = "use only the first N prompts (default: all; 500 captions for demo)"
    _add(command, "--num-prompts", integer(1, choices.SEED_STRIDE), text, metavar="N")
    _add(command, "--prompts-seed", integer(0), "of the demo world's captions", 1234)


def _add_metric_flags(command: Parser) -> None:
    """What to measure, and by which networks."""
    group = command.add_argument_group("metrics")
    text = f"among {', '.join(choices.METRICS)} (default: those that the demo world has, else none)"
    _add(group, "--metrics", nonempty, text, nargs="*")
    text = (
        "real images: a folder, ADM's statistics (.npz), published statistics by name such as adm-imagenet256 "
        "(docs/evaluation.md lists them), or 'demo' for renderings of the prompts"
    )
    _add(group, "--reference", nonempty, text)
    text = "file of --reference's published statistics, or its folder (default: the folder in $INFOGAIN_REFERENCES)"
    _add(group, "--reference-file", path, text)
    text = "of the distances (default: demo for the demo's prompts, else inception)"
    group.add_argument("--features", choices=choices.FEATURES, help=text)
    text = (
        "how images are resized for the network: by Pillow's filters with antialiasing, on the largest centred square; 'clean': "
        "as clean-fid does; or 'network': by the network itself, as for published FIDs (default: as for --reference's "
        "statistics, else bicubic)"
    )
    group.add_argument("--resize", choices=choices.RESIZES, help=text)
    _add(group, "--inception-weights", path, "file of FID's weights (default: torch-fidelity downloads them)")
    _add(group, "--clip-model", nonempty, "folder or Hub id of a CLIP model")
    _add(group, "--dinov2-model", nonempty, "folder or Hub id of a DINOv2 model (default: facebook/dinov2-large)")
    text = "folder or Hub id of the CLIP model for cmmd (default: openai/clip-vit-large-patch14-336)"
    _add(group, "--cmmd-model", nonempty, text)
    text = "folder or Hub id of PickScore in transformers' format (default: yuvalkirstain/PickScore_v1)"
    _add(group, "--pick-score-weights", nonempty, text)
    for version in ("v2", "v2.1"):
        text = f"file, or a folder or Hub id that holds it (default: HPS_{version}_compressed.pt of xswu/HPSv2)"
        _add(group, f"--hps-{version.replace('.', '-')}-weights", nonempty, text)
    text = "file, or a folder or Hub id that holds it (default: ImageReward.pt of THUDM/ImageReward)"
    _add(group, "--image-reward-weights", nonempty, text)
    text = "folder or Hub id of what reads prompts for PickScore and HPSv2 (default: laion/CLIP-ViT-H-14-laion2B-s32B-b79K)"
    _add(group, "--clip-h-processor", nonempty, text)
    text = "folder or Hub id of what reads prompts for ImageReward (default: google-bert/bert-base-uncased)"
    _add(group, "--bert-tokenizer", nonempty, text)


def _add_split_flag(command: Parser, of: str) -> None:
    text = f"{of}: choose settings on the first, report on the second, and make published figures once on the third"
    command.add_argument("--split", choices=choices.SPLITS, help=f"part of all {text} (default: no part)")


def _add_samplers_flag(
    command: Parser, default: tuple[str, ...] | None, how: str = "", of_call: str = "num_beams / num_runs"
) -> None:
    text = (
        f"samplers or presets (`diffusers-infogain samplers` lists them) with settings of the scheduler, or {of_call}, such as "
        f"maskgit:token_temperature=0.7{how}"
    )
    _add(command, "--samplers", nonempty, text, default and list(default), nargs="+", metavar="NAME[:KEY=VALUE,...]")


def _add_text_call_flags(command: Parser) -> None:
    """Arguments of a text pipeline's call that change no text."""
    _add_lookahead_flag(command)
    text = "of keys and values; prefix and dual are approximations (default: exact if possible, else none)"
    command.add_argument("--cache", choices=choices.CACHES, help=text)


def _add_decoding_flags(command: Parser) -> None:
    """Arguments of a text pipeline's call."""
    _add(command, "--block-length", integer(1, MOST), "tokens per block, decoded in turn (default: all, or the model's)")
    _add(command, "--steps", integer(1), "decoding steps in all (default: one token a step, or --tokens-per-step)")
    _add_text_call_flags(command)
    _add_search_flags(command, "block")


def add_generate(command: Parser) -> None:
    """Adds the flags of `generate`."""
    _add_prompt_arguments(command, "what to draw")
    _add_model_flags(command)
    _add_output_flag(command, "outputs", "folder for the images")
    command.add_argument("--grid", action="store_true", help="also write all images into one picture, grid.png")
    _add_count_flag(command, "--num-images", "images per prompt, with consecutive seeds")
    _add_editing_flags(command)
    _add_task_flags(command)
    _add_image_call_flags(command)
    _add_machine_flags(command)
    add_sampler_flags(command)


def add_demo(command: Parser) -> None:
    """Adds the flags of `demo`."""
    _add_output_flag(command, "outputs", "folder for demo.png")
    _add(command, "--steps", integer(1, MOST), "decoding steps", 8)
    _add_count_flag(command, "--num-prompts", "held-out prompts behind each accuracy", 120)
    _add_machine_flags(command)


def add_exact(command: Parser) -> None:
    """Adds the flags of `exact`."""
    _add(command, "--num-samples", integer(1, MOST), "per sampler and task", 200)
    _add_samplers_flag(command, None, "; as many steps as tokens, or fewer with a bound (default: a fixed selection)")
    _add_seeds_flag(command, [0])
    _add_split_flag(command, "seeds")


def add_evaluate(command: Parser) -> None:
    """Adds the flags of `evaluate`."""
    _add_prompt_set_flags(command)
    _add_model_flags(command)
    _add_output_flag(command, "outputs/evaluation")
    text = "measure the images in this folder, by their own prompts or those of --prompts, instead of generating some"
    _add(command, "--images", path, text)
    _add_count_flag(command, "--num-images", "images per prompt")
    text = "of the files: numbered, or as the scripts of GenEval, DPG-Bench and T2I-CompBench read them (default: plain)"
    command.add_argument("--layout", default="plain", choices=choices.LAYOUTS, help=text)
    _add_metric_flags(command)
    text = "file (.npz) for the statistics of the reference, or of the images if there is none, for a later --reference"
    _add(command, "--save-statistics", path, text, metavar="FILE")
    _add_image_call_flags(command)
    _add_machine_flags(command)
    add_sampler_flags(command)


def add_compare(command: Parser) -> None:
    """Adds the flags of `compare`."""
    _add_prompt_set_flags(command)
    _add_metric_flags(command)
    _add_model_flags(command)
    _add_output_flag(command, "outputs/comparison")
    of_call = (
        "num_beams / num_runs / guidance_scale / guidance_schedule / guidance_interval / guided_lookahead / approximate_cache"
    )
    _add_samplers_flag(command, DEFAULT_SAMPLERS, of_call=of_call)
    _add(command, "--steps", integer(1), "numbers of steps", [8, 16], nargs="+")
    text = "of samplers that look ahead (default: the preset's, else the model's)"
    _add(command, "--num-candidates", integer(1, HIGHEST["num_candidates"]), text, nargs="+")
    _add(command, "--guidance-scales", number(-LARGEST_NUMBER), "(default: the model's, 1.2 for demo)", nargs="+")
    _add_seeds_flag(command, [0, 1, 2])
    _add_count_flag(command, "--num-images", "images per prompt")
    text = "prompts whose images are put side by side in samples.jpg, under the first samplers"
    _add(command, "--grid", integer(0, 1000), text, 6, metavar="N")
    command.add_argument("--everything", action="store_true", help="report all runs in the output folder, not only these")
    text = "results.json of a comparison on other prompts, whose best greedy rules are run too, for samplers to be compared with"
    _add(command, "--rivals", path, text, metavar="FILE")
    _add(command, "--report", path, "folder for table and plots (default: that of --output)")
    _add(command, "--negative-prompt", utf8, "what to steer away from")
    _add_approximate_cache_flag(command)
    _add_size_flags(command)
    _add_device_flags(command, 16)
    _add_lookahead_flag(command, 16)


def add_convert(command: Parser) -> None:
    """Adds the flags of `convert`."""
    command.add_argument("source", type=nonempty, help="folder, Hub id or weight file in its publisher's format")
    command.add_argument("target", type=path, help="folder to write; must not exist yet")
    command.add_argument("--text", action="store_true", help="convert only MMaDA's language model (text generation)")
    _add_loading_flags(command)
    command.add_argument("--dtype", choices=DTYPES, help="of the weights (default: as stored)")
    _add(command, "--max-shard-size", number(1e-3, 1e6), "of a weight file", 5.0, metavar="GB")


def add_samplers(command: Parser) -> None:
    """Adds nothing: `samplers` has no flags."""
