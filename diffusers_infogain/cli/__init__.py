"""The command line, `diffusers-infogain`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from . import compare, convert, demo, evaluate, exact, generate, lm_eval, text

_COMMANDS: tuple[tuple[str, Callable[[argparse.Namespace], None], Callable[[argparse.ArgumentParser], None]], ...] = (
    ("generate", generate.generate, generate.add_arguments),
    ("demo", demo.demo, demo.add_arguments),
    ("exact", exact.exact, exact.add_arguments),
    ("evaluate", evaluate.evaluate, evaluate.add_arguments),
    ("compare", compare.compare, compare.add_arguments),
    ("text", text.text, text.add_text_arguments),
    ("compare-text", text.compare_text, text.add_compare_arguments),
    ("lm-eval", lm_eval.lm_eval, lm_eval.add_arguments),
    ("convert", convert.convert, convert.add_arguments),
)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; each sets `run`."""
    parser = _Parser(prog="diffusers-infogain", description="Info-gain sampling for masked diffusion models.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, run, add_arguments in _COMMANDS:
        command = commands.add_parser(name, help=run.__doc__, description=run.__doc__)
        command.set_defaults(run=run)
        add_arguments(command)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; wrong input ends with one sentence on stderr and exit code 2."""
    args = build_parser().parse_args(arguments)
    try:
        args.run(args)
    except (ValueError, OSError, ImportError) as error:
        print(f"diffusers-infogain: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("diffusers-infogain: interrupted", file=sys.stderr)
        return 130
    return 0
