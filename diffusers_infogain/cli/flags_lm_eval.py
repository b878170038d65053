"""The flags of `lm-eval`."""

from __future__ import annotations

from ..choices import LIKELIHOODS
from . import flags, flags_text


def add_lm_eval(command: flags.Parser) -> None:
    """Adds the flags of `lm-eval`."""
    flags._add(command, "--tasks", flags.nonempty, "names of tasks, groups or tags", nargs="+", required=True)
    flags._add(command, "--include-path", flags.path, "folder with further tasks (YAML)")
    flags._add(command, "--model", flags.nonempty, "a folder or a Hub id", required=True)
    flags._add_output_flag(command, "outputs/lm_eval")
    flags._add(command, "--limit", flags.integer(1), "use only the first N problems of every task", metavar="N")
    flags._add(command, "--num-fewshot", flags.integer(0, 1000), "examples in the prompt (default: the task's)")
    command.add_argument("--chat", action="store_true", help="render prompts as chats, with the tokenizer's template")
    flags._add(command, "--chat-template", flags.path, "file with a Jinja template (default: the tokenizer's)", metavar="FILE")
    text = "variables for the template, such as enable_thinking=false"
    command.add_argument("--template-variable", type=flags_text.variable, nargs="+", help=text, metavar="NAME=VALUE")
    text = "begin prompts with the token that begins texts, as Dream's evaluation does"
    command.add_argument("--add-bos-token", action="store_true", help=text)
    flags._add(command, "--system-instruction", flags.utf8, "in front of every prompt")
    text = "settings that override the task's, such as max_gen_toks=512,do_sample=true,temperature=1"
    flags._add(command, "--gen-kwargs", flags.utf8, text)
    flags._add(command, "--max-gen-toks", flags.integer(1, flags.MOST), "new tokens if a task does not say", 256)
    text = "requests without sampling set the token temperature to 0 (default: they leave the sampler as it is)"
    command.add_argument("--greedy-tokens", action="store_true", help=text)
    text = "run the programs that the model writes, on this machine (HumanEval, MBPP); refused otherwise"
    command.add_argument("--allow-code-execution", action="store_true", help=text)
    flags._add_decoding_flags(command)
    flags_text._add_end_flags(command, stop_strings=False)
    text = "strength of classifier-free guidance, which doubles the work; 1 is off (LLaDA's cfg + 1)"
    flags._add(command, "--guidance-scale", flags.number(1, 1e6), text, 1.0)
    _add_likelihood_flags(command)
    flags._add_machine_flags(command, "text")
    flags.add_sampler_flags(command, of_text=True)


def _add_likelihood_flags(command: flags.Parser) -> None:
    """How likelihoods are estimated."""
    group = command.add_argument_group("likelihoods", "of multiple choice and of whole texts")
    text = "estimate: of LLaDA's evaluation, of Dream's, or with the tokens written in one order (default: llada)"
    group.add_argument("--likelihood", choices=LIKELIHOODS, default="llada", help=text)
    flags._add(group, "--num-draws", flags.integer(1), "how often an answer is masked; 1 is enough for answers of one token", 128)
    text = "draws that are spread evenly together (default: 8, or all if they are fewer)"
    flags._add(group, "--group-size", flags.integer(1), text)
    text = "do not look if greedy decoding writes the answer, which few tasks count (LAMBADA)"
    group.add_argument("--no-greedy-check", action="store_true", help=text)
    text = "an end of text follows every answer, as in Dream's evaluation"
    group.add_argument("--append-eos", action="store_true", help=text)
