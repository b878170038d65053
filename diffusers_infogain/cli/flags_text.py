"""The flags of `text` and `compare-text`."""

from __future__ import annotations

import argparse
import json
from typing import Any

from .. import choices
from . import flags

_PYTHON = {"True": "true", "False": "false", "None": "null"}

DEFAULT_TEXT_SAMPLERS = ("confidence", "entropy", "margin", "maskgit", "uniform", "lookum", "info_gain", "paper")


def variable(text: str) -> tuple[str, Any]:
    """The type of a flag for a variable of a chat template; values are JSON, Python's True, False and None, or else text."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"must have the form name=value, got {flags.shown(text)}")
    try:
        return name, json.loads(_PYTHON.get(value, value))
    except (ValueError, RecursionError):
        return name, flags.utf8(value)


def _add_chat_flags(command: flags.Parser, how: str) -> None:
    """How prompts become chats, with the flag `how`."""
    group = command.add_argument_group("chats", f"with {how}")
    flags._add(group, "--chat-template", flags.path, "file with a Jinja template (default: the tokenizer's)", metavar="FILE")
    text = "variables for the template, such as enable_thinking=false"
    group.add_argument("--template-variable", type=variable, nargs="+", help=text, metavar="NAME=VALUE")
    flags._add(group, "--answer-begin", flags.utf8, "how every answer begins; the model continues it", metavar="TEXT")


def _add_guidance_flags(command: flags.Parser) -> None:
    """Classifier-free guidance."""
    text = "strength of classifier-free guidance, which doubles the work; 1 is off (LLaDA's cfg_scale + 1)"
    flags._add(command, "--guidance-scale", flags.number(1, 1e6), text, 1.0)
    text = "what to steer away from, in a chat as a user's turn (default: the prompt, masked)"
    flags._add(command, "--negative-prompt", flags.utf8, text, metavar="TEXT")


def _add_end_flags(command: flags.Parser, stop_strings: bool = True) -> None:
    """Arguments of a text pipeline's call that say what is written, and where texts end."""
    group = command.add_argument_group("what is written")
    if stop_strings:
        text = "strings before which a text is cut, and that end it with their block, such as $'\\n\\n'"
        flags._add(group, "--stop-strings", flags.nonempty, text, nargs="+", metavar="TEXT")
    text = "what ends the thinking, such as '</think>': the text is what follows, and stop strings count there only"
    flags._add(group, "--think-end-token", flags.nonempty, text, metavar="TEXT")
    flags._add(
        group, "--min-new-tokens", flags.integer(0, flags.MOST), "no end of text among the first N new tokens", 0, metavar="N"
    )
    text = "taken from the logits of tokens that end a text, in nats; a negative one makes texts shorter"
    flags._add(group, "--eos-penalty", flags.number(-1e6, 1e6), text, 0.0, metavar="NATS")
    text = "decode positions at which an end of text is drawn behind all others of the block (LLaDA's confidence_eos_eot_inf)"
    group.add_argument("--postpone-eos", action="store_true", help=text)
    text = "tokens that are never written, such as '<|endoftext|>' (LLaDA's logits_eos_inf)"
    flags._add(group, "--suppress-tokens", flags.nonempty, text, nargs="+", metavar="TOKEN")
    text = "factor by which logits of tokens that the text or the prompt has already are lowered; above 1, such as 1.2"
    flags._add(group, "--repetition-penalty", flags.number(1e-3, 1e3), text, metavar="X")
    text = "no N tokens a second time in that order, as far as they are decoded from left to right"
    flags._add(group, "--no-repeat-ngram-size", flags.integer(1, flags.MOST), text, metavar="N")


def add_text(command: flags.Parser) -> None:
    """Adds the flags of `text`."""
    flags._add_prompt_arguments(command, "what to answer")
    flags._add_text_model_flag(command)
    flags._add(command, "--output", flags.path, "file of JSON lines to write or to resume (default: print the texts)")
    text = "print the tokens in the color of the step that decoded them; without a terminal, a line for every step"
    command.add_argument("--show", action="store_true", help=text)
    flags._add(command, "--html", flags.path, "page to write, with the tokens in the colors of step and entropy", metavar="FILE")
    command.add_argument("--chat", action="store_true", help="prompts are a user's turn in a chat")
    flags._add_count_flag(command, "--num-texts", "texts per prompt, with consecutive seeds")
    text = "(default: 128; 16 for demo-text; 0, which only fills in masks, if prompts have any)"
    flags._add(command, "--max-new-tokens", flags.integer(0, flags.MOST), text)
    flags._add_decoding_flags(command)
    _add_guidance_flags(command)
    _add_chat_flags(command, "--chat")
    _add_end_flags(command)
    flags._add_machine_flags(command, "text")
    flags.add_sampler_flags(command, of_text=True)


def add_compare_text(command: flags.Parser) -> None:
    """Adds the flags of `compare-text`."""
    text = "(default: all that --ask allows)"
    command.add_argument("--tasks", nargs="+", choices=choices.TEXT_TASKS, help=text)
    text = (
        "infill: fill in the answer's template, for models of single characters such as demo-text; prompt: ask in words; chat: "
        "ask in words, as a user's turn (default: infill)"
    )
    command.add_argument("--ask", choices=("infill", "prompt", "chat"), default="infill", help=text)
    text = "solved problems before each, with --ask prompt or chat (default: 5 for sudoku, 3 for countdown, else none)"
    flags._add(command, "--num-fewshot", flags.integer(0, 1000), text)
    flags._add(command, "--max-new-tokens", flags.integer(1, flags.MOST), "with --ask prompt or chat (default: 128)")
    flags._add(
        command, "--block-length", flags.integer(1, flags.MOST), "tokens per block, decoded in turn, with --ask prompt or chat"
    )
    of_call = "num_beams / num_runs / guidance_scale / eos_penalty / postpone_eos"
    flags._add_samplers_flag(command, DEFAULT_TEXT_SAMPLERS, of_call=of_call)
    flags._add(command, "--tokens-per-step", flags.integer(1), "", [1, 2, 4], nargs="+")
    flags._add_seeds_flag(command, [0, 1, 2])
    flags._add_count_flag(command, "--num-problems", "per task", 200)
    flags._add(command, "--problem-seed", flags.integer(0), "of the problems", 0)
    flags._add_split_flag(command, "problems and seeds")
    flags._add_text_model_flag(command)
    command.add_argument("--everything", action="store_true", help="report all runs in the output folder, not only these")
    text = "output folder of a comparison on another split: the best greedy rules there are what samplers are compared with here"
    flags._add(command, "--rivals", flags.path, text, metavar="FOLDER")
    command.add_argument("--plots", action="store_true", help="plot right against distinct answers, for each task")
    flags._add_text_call_flags(command)
    _add_guidance_flags(command)
    _add_chat_flags(command, "--ask chat")
    _add_end_flags(command)
    flags._add_output_flag(command, "outputs/text")
    flags._add_device_flags(command, 50, "problem")
