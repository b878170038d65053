"""The command line, `diffusers-infogain`."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any, NoReturn

from .. import processes
from . import errors, flags, flags_app, flags_benchmark, flags_export, flags_lm_eval, flags_show, flags_text

_INTERRUPTED, _TERMINATED, _NOBODY_READS = 130, 143, 141


@dataclass(frozen=True)
class Command:
    """A command, whose module with all that it needs is imported only when the command runs.

    Attributes:
        summary: One line for `--help`.
        function: "module.function" below this package.
        add_flags: Adds the command's flags to its parser.
        shared: Whether the processes of a launcher share its work; otherwise only the main one runs it.
    """

    name: str
    summary: str
    function: str
    add_flags: Callable[[argparse.ArgumentParser], None]
    shared: bool = False


COMMANDS = (
    Command(
        "generate",
        "Generate images from prompts, as PNG files that hold their settings.",
        "generate.generate",
        flags.add_generate,
        shared=True,
    ),
    Command(
        "show",
        "Draw how an image or a text was decoded, from what its file records: maps, curves, a film.",
        "show.show",
        flags_show.add_show,
    ),
    Command(
        "demo",
        "Compare four samplers on the same prompts and seeds in one picture, judged by the demo world's checker.",
        "demo.demo",
        flags.add_demo,
    ),
    Command("samplers", "List the samplers and presets, with one line each.", "samplers.samplers", flags.add_samplers),
    Command("exact", "Compare all samplers on models with exact marginals, in one table.", "exact.exact", flags.add_exact),
    Command(
        "evaluate",
        "Generate images from many prompts, resumable, and report their metrics.",
        "evaluate.evaluate",
        flags.add_evaluate,
        shared=True,
    ),
    Command(
        "compare",
        "Compare samplers x steps x candidates x guidance x seeds on the same prompts: figures, a table and plots.",
        "compare.compare",
        flags.add_compare,
        shared=True,
    ),
    Command(
        "text",
        "Generate texts from prompts with a masked language model; resumable with --output.",
        "text.text",
        flags_text.add_text,
        shared=True,
    ),
    Command(
        "compare-text",
        "Compare samplers x tokens per step x seeds on text tasks with exact checkers: figures and tables.",
        "compare_text.compare_text",
        flags_text.add_compare_text,
        shared=True,
    ),
    Command(
        "lm-eval",
        "Run lm-eval tasks, such as gsm8k or arc_challenge: scores, samples and their costs; resumable.",
        "lm_eval.lm_eval",
        flags_lm_eval.add_lm_eval,
        shared=True,
    ),
    Command(
        "benchmark",
        "Measure speed: seconds inside and outside the network, its rows and memory, for any model, sampler and batch size.",
        "benchmark.benchmark",
        flags_benchmark.add_benchmark,
    ),
    Command(
        "app",
        "Try a model in the browser: generate, compare two samplers, edit; only on this machine unless told.",
        "app.app",
        flags_app.add_app,
    ),
    Command(
        "convert",
        "Convert a published checkpoint to a diffusers folder in safetensors: every tensor checked, and the result tested.",
        "convert.convert",
        flags.add_convert,
    ),
    Command(
        "export",
        "Write a model with its sampler as a repository that runs without this package: weights, code and a model card.",
        "export.export",
        flags_export.add_export,
    ),
)


class _Parser(argparse.ArgumentParser):
    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parses like argparse, but refuses `--flag=--`, whose value becomes an empty list before Python 3.13."""
        args = sys.argv[1:] if args is None else list(args)
        for word in args:
            if word.startswith("--") and word.endswith("=--"):
                self.error(f"argument {word.removesuffix('=--')}: expected a value, got '--'")
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        if processes.local_index():  # all processes of this machine have the same flags, and the first says so
            self.exit(errors.USAGE)
        self.exit(errors.USAGE, f"{self.prog}: error: {errors.one_sentence(message)} (see {self.prog} --help)\n")


def build_parser() -> argparse.ArgumentParser:
    """Builds the parser of all commands; the parsed `command` is the command's name."""
    from .. import __version__

    epilog = f"With {errors.TRACEBACK}=1 errors print their traceback."
    parser = _Parser(prog="diffusers-infogain", description="Info-gain sampling for masked diffusion models.", epilog=epilog)
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command")
    for command in COMMANDS:
        command.add_flags(commands.add_parser(command.name, help=command.summary, description=command.summary))
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code. Of several processes all end if one fails, and that one says why.

    Errors that users can fix print one sentence to stderr and return 2, bugs 70, an interruption 130, SIGTERM 143, and an output
    whose reader has gone 141.

    Raises:
        SystemExit: For `--help`, `--version` and invalid flags (code 2).
    """
    args = None
    received: list[int] = []
    try:
        with _signals_interrupt(received):
            parser = build_parser()
            args = parser.parse_args(arguments)
            if args.command is None:
                parser.print_help(sys.stderr)
                return errors.USAGE
            _run(args)
            sys.stdout.flush()
            return 0
    except processes.OtherProcessFailedError as error:
        if received:
            return _code(received)
        if str(error):
            print(f"diffusers-infogain: error: {error}{processes.place()}", file=sys.stderr)
        return errors.USAGE
    except BrokenPipeError:
        return _NOBODY_READS
    except KeyboardInterrupt:
        return _interrupted(received)
    except Exception as error:
        if received:  # Compiled code that calls Python replaces any exception by one of its own, an interruption, too.
            return _interrupted(received)
        if os.environ.get(errors.TRACEBACK):
            traceback.print_exc()
        sentence, code = errors.explain(error, args)
        print(f"diffusers-infogain: error: {sentence}{processes.place()}", file=sys.stderr)
        return code
    finally:
        _leave_nothing_to_flush()


def _interrupted(received: Sequence[int]) -> int:
    print(f"diffusers-infogain: {'terminated' if signal.SIGTERM in received else 'interrupted'}", file=sys.stderr)
    return _code(received)


def _code(received: Sequence[int]) -> int:
    return _TERMINATED if signal.SIGTERM in received else _INTERRUPTED


def _leave_nothing_to_flush() -> None:
    """Flushes the output now, since Python would print a traceback if its own flush at exit failed."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run(args: argparse.Namespace) -> None:
    command = next(command for command in COMMANDS if command.name == args.command)
    index, count = processes.launched()
    if index > 0 and not command.shared:
        return
    if count > 1 and not command.shared:
        others = "the other has" if count == 2 else f"the other {count - 1} have"
        print(f"diffusers-infogain: {command.name} runs in one process, and {others} nothing to do.", file=sys.stderr)
    if count > 1:  # read as torch is imported, which would print the stack of a process whose main one has failed and left
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    with processes.joined() if command.shared else contextlib.nullcontext(processes.ALONE) as args.processes:
        if hasattr(args, "device"):  # checked before anything is loaded
            from .device import choose_device, own_device

            args.device = choose_device(args.device)
            if args.processes.count > 1:
                args.device = own_device(args.device)
        if hasattr(args, "dtype"):  # the command loads a model
            from ..progress import quiet_libraries

            quiet_libraries(args.processes.is_main)
        module, function = command.function.split(".")
        getattr(importlib.import_module(f".{module}", __name__), function)(args)


@contextlib.contextmanager
def _signals_interrupt(received: list[int]) -> Iterator[None]:
    """Makes SIGTERM interrupt the block like SIGINT, so that temporary files and locks are cleaned up.

    Changes nothing in other threads than the main one, or for a signal that has a handler of the user's.

    Args:
        received: Gets the numbers of the signals that arrived.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    usual = {signal.SIGTERM: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}
    replaced = {number: handler for number, handler in usual.items() if in_main_thread and signal.getsignal(number) == handler}

    def interrupt(number: int, frame: FrameType | None) -> NoReturn:
        received.append(number)
        raise KeyboardInterrupt

    for number in replaced:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in replaced.items():
            signal.signal(number, handler)
