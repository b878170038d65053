"""Every command with every flag at every value: code 0, or 2 and one sentence; nothing hangs, and no half file is left."""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
from helpers.amused import make_components
from helpers.checkpoints_text import write_bert, write_llada
from helpers.fuzz import SECONDS, HangError, is_sentence, limited

from diffusers_infogain import InfoGainPipeline, InfoGainTextPipeline, cli

LEGAL = 4
"""Up to here numbers that flags take are tried; larger ones that are taken are just more work."""
WORK = {
    *(
        "steps",
        "num_images",
        "num_prompts",
        "num_texts",
        "num_samples",
        "num_problems",
        "num_candidates",
        "num_beams",
        "num_runs",
    ),
    *("height", "width", "max_new_tokens", "tokens_per_step", "seeds", "num_fewshot", "limit", "max_gen_toks", "batch_size"),
    *("batch_sizes", "runs", "threads", "prompt_length", "length", "codebook_size"),
}
"""Flags that say how much is to be done."""
NUMBERS = [
    "0",
    "1",
    "2",
    "3",
    "-1",
    "-0",
    "0.5",
    "1e308",
    "-1e308",
    "nan",
    "inf",
    "-inf",
    "1e-300",
    "1_0",
    " 1",
    "0x10",
    "1e3",
    "٣",
    "9" * 5000,
]
NUMBERS += [str(2**31), str(2**63 - 1), str(2**63), str(2**64), str(-(2**63)), str(10**30), "true", "None", "1,2", "½"]
TEXTS = [
    "",
    " ",
    "\0",
    "a\0b",
    "\ud800",
    "ä",
    "🎨",
    "x" * 100_000,
    "a\nb",
    "-",
    "--",
    "---",
    "@file",
    "*",
    "?",
    "[!a]",
    "~",
    "$HOME",
    "%s",
    "{}",
    "{0.a}",
    "{x}",
]
TEXTS += [
    "{",
    "null",
    "[1]",
    '{"a": 1}',
    "a:b=c",
    "maskgit:",
    "maskgit:top_k=x",
    "info_gain:num_candidates=2",
    ":,=",
    "a=b",
    "max_gen_toks=x",
]
TEXTS += [
    "cpu",
    "cuda",
    "cuda:99",
    "meta",
    "demo",
    "fp16",
    "constant",
    "kl",
    "halton",
    "maskgit",
    "pc_sampler",
    "entropy_bound",
    "even",
]
TEXTS += [
    "http://127.0.0.1:9/x",
    "a/b",
    "../x",
    "a/b/c",
    "hf://x",
    "kid",
    "frechet",
    "composition",
    "diversity",
    "klass_parallel",
]


class Bench:
    """A folder with models, files of every kind, and places where nothing can be written."""

    def __init__(self, root: Path):
        self.root = root
        InfoGainPipeline(**make_components()).save_pretrained(root / "amused")
        write_llada(root / "llada")
        InfoGainTextPipeline.from_pretrained(root / "llada").save_pretrained(root / "saved-llada")
        write_bert(root / "bert")
        (root / "prompts.txt").write_text("a cat\na dog\n")
        (root / "empty").touch()
        (root / "binary").write_bytes(bytes(range(256)) * 10)
        (root / "image.png").write_bytes(b"\x89PNG\r\n\x1a\n")
        (root / "photos").mkdir()
        for number in range(2):
            PIL.Image.new("RGB", (16 + number, 9), (number, 9, 200)).save(root / "photos" / f"{number}.png")
        (root / "folder" / "inner").mkdir(parents=True)
        (root / "loop").symlink_to(root / "loop")
        (root / "dangling").symlink_to(root / "nowhere")
        os.mkfifo(root / "fifo")
        os.mkfifo(root / "folder" / "fifo")
        (root / "list.json").write_text("[1, 2]")
        self.paths = [str(path) for path in sorted(root.iterdir())]
        self.paths += [
            *("/proc/self/mem", "/dev/null", "/dev/zero", "/dev/full", "/proc/x/y", "/sys/x", ".", "..", "/", "nothing/here")
        ]
        self.paths += [str(root / "empty" / "below"), "a" * 300, "b/" * 3000, str(root / "folder" / "x.npz")]


BASE: dict[str, list[str]] = {
    "generate": ["a cat", "--model", "amused", "--steps", "2"],
    "demo": ["--num-prompts", "1", "--steps", "1"],
    "samplers": [],
    "exact": ["--num-samples", "1"],
    "evaluate": ["--prompts", "prompts.txt", "--model", "amused", "--steps", "2"],
    "compare": ["--prompts", "prompts.txt", "--model", "amused", "--steps", "2", "--samplers", "maskgit", "--seeds", "0"],
    "text": ["ab", "--model", "llada", "--max-new-tokens", "3"],
    "compare-text": [
        "--num-problems",
        "1",
        "--tasks",
        "sudoku",
        "--samplers",
        "maskgit",
        "--tokens-per-step",
        "8",
        "--seeds",
        "0",
    ],
    "lm-eval": ["--tasks", "nothing", "--model", "llada"],
    "benchmark": ["--random", "amused-nano", "--steps", "2", "--runs", "1", "--batch-sizes", "1", "--sampler", "halton"],
    "convert": ["llada", "converted"],
    "export": ["amused", "exported"],
    "show": ["image.png"],
}
SLOW = {"demo": 0.03, "exact": 0.03, "lm-eval": 0.03}
"""Commands whose every run takes seconds: the share of their cases that is tried."""


def subparsers() -> dict[str, argparse.ArgumentParser]:
    actions = cli.build_parser()._actions
    return next(action.choices for action in actions if isinstance(action, argparse._SubParsersAction))


def flags(command: str) -> list[argparse.Action]:
    return [action for action in subparsers()[command]._actions if not isinstance(action, argparse._HelpAction)]


def is_more_work(action: argparse.Action, value: str) -> bool:
    """Whether the flag takes the value, which only means more work: a large number or model, or the demo world's 500 captions."""
    if "--random" in action.option_strings and value in (action.choices or ()):
        return not value.endswith("nano") or value == "meissonic-nano"
    if "--prompts" in action.option_strings and value == "demo":
        return True
    if action.dest not in WORK or action.type is None:
        return False
    try:
        return float(action.type(value)) > LEGAL
    except (argparse.ArgumentTypeError, ValueError, OverflowError, TypeError):
        return False


def hostile(rng: random.Random, action: argparse.Action, bench: Bench) -> str:
    while True:
        choices = list(action.choices) if action.choices else [str(action.default)]
        value = rng.choice(rng.choice([NUMBERS, TEXTS, bench.paths, choices]))
        if not is_more_work(action, value):
            return value


def words(rng: random.Random, action: argparse.Action, bench: Bench) -> list[str]:
    """A flag with hostile values, as many as it takes or not."""
    count = 0 if action.nargs == 0 else rng.choice([1, 1, 1, 1, 2, 3, 0]) if action.nargs else 1
    given = [hostile(rng, action, bench) for _ in range(count)]
    if not action.option_strings:
        return given
    option = rng.choice(action.option_strings)
    if len(given) == 1 and rng.random() < 0.3:
        return [f"{option}={given[0]}"]
    return [option, *given]


def command_line(rng: random.Random, command: str, action: argparse.Action | None, bench: Bench) -> list[str]:
    """The command's plain words with one flag, or several, at hostile values."""
    line = list(BASE[command])
    every = flags(command)
    chosen = [action] if action is not None else rng.sample(every, min(rng.randint(1, 6), len(every)))
    for one in chosen:
        if not one.option_strings and rng.random() < 0.7:
            line = line[1:]
        line = [*words(rng, one, bench), *line] if rng.random() < 0.2 else [*line, *words(rng, one, bench)]
    if rng.random() < 0.05:
        line.insert(rng.randrange(len(line) + 1), rng.choice([*TEXTS, "--help", "--no-such-flag", "-x", "--stepz", "--se"]))
    return [rng.choice([command] * 30 + [command[:-1], command.upper(), "", "-"]), *line]


def run(line: list[str]) -> tuple[Any, str]:
    out, errors = io.StringIO(), io.StringIO()
    with limited(60 if "lm-eval" in line else SECONDS), contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        try:
            code: Any = cli.main(line)
        except SystemExit as exit:
            code = exit.code
    return code, errors.getvalue()


def check_files(folder: Path) -> None:
    """What is left is whole."""
    for path in folder.rglob("*"):
        if path.is_symlink() or not path.is_file():
            continue
        assert not path.name.endswith((".part", ".tmp")), path
        if path.suffix == ".png":
            PIL.Image.open(path).load()
        elif path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".jsonl":
            assert all(json.loads(one) for one in path.read_text().splitlines())


def check(line: list[str], folder: Path) -> Any:
    shown = [word[:200] for word in line]
    try:
        code, errors = run(line)
    except HangError as error:
        raise AssertionError(f"{shown}: {error}") from error
    except BaseException as error:
        raise AssertionError(f"{shown}: {type(error).__name__} {error}") from error
    assert code in (0, 2), (shown, code, errors[-3000:])
    assert "Traceback" not in errors, (shown, errors[-3000:])
    if code:
        sentence = errors.strip().rsplit("\n", 1)[-1]
        helped = "usage:" in errors  # no command at all
        assert helped or (sentence.startswith("diffusers-infogain") and " error: " in sentence), (shown, errors[-3000:])
        assert is_sentence(sentence) or helped, (shown, len(sentence), sentence[:3000])
    check_files(folder)
    return code


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Bench:
    return Bench(tmp_path_factory.mktemp("bench"))


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """Every case begins in a folder of links to the bench."""
    folder = tmp_path / "home"
    monkeypatch.setenv("HOME", str(tmp_path))
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def begin_anew(home: Path, bench: Bench) -> None:
    for path in home.iterdir():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    for name in ("amused", "llada", "saved-llada", "bert", "prompts.txt"):
        (home / name).symlink_to(bench.root / name)


def cases(seed: int, bench: Bench) -> Iterator[list[str]]:
    """All flags of all commands in turn, each alone and then several at once."""
    rng = random.Random(f"command line {seed}")
    singles = [(command, action) for command in BASE for action in flags(command) if rng.random() < SLOW.get(command, 1)]
    several = [(command, None) for command in BASE for _ in range(20) if rng.random() < SLOW.get(command, 1)]
    every = [*singles, *several]
    rng.shuffle(every)
    for command, action in every:
        yield command_line(rng, command, action, bench)


def fuzz(seed: int, count: int | None, bench: Bench, home: Path) -> list[Any]:
    codes = []
    for number, line in enumerate(itertools.islice(cases(seed, bench), count)):
        if number % 4 == 0:  # others go on with what is there
            begin_anew(home, bench)
        codes.append(check(line, home))
    return codes


def test_commands_end_with_0_or_with_2_and_one_sentence(bench, home):
    codes = fuzz(0, 45, bench, home)
    assert 0 in codes
    assert codes.count(2) > 20


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 9))
def test_all_flags_of_all_commands_end_with_0_or_with_2_and_one_sentence(seed, bench, home):
    codes = fuzz(seed, None, bench, home)
    assert codes.count(2) > 200


def test_every_command_is_tried():
    assert set(BASE) == set(subparsers()) - {"app"}  # which serves until it is stopped
