"""examples/slurm_array.sh, with a command that stands in for the real one, and with the demo model."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import pytest

from diffusers_infogain import cli

SCRIPT = Path(__file__).parents[1] / "examples" / "slurm_array.sh"
PROMPTS = ["a red circle", "two green squares", "", "a blue diamond", "three red squares", "a cyan circle", "a pink square"]


@pytest.fixture
def prompts(tmp_path) -> Path:
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin" / "diffusers-infogain"
    command.write_text("#!/bin/bash\nprintf '%s ' \"${@@Q}\"\n")
    command.chmod(0o755)
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(PROMPTS))  # the last line has no newline
    return file


def start(task: int | None, *words: object, **variables: object) -> subprocess.CompletedProcess[str]:
    """A task of an array; the command is not run, but printed."""
    own = {"BATCH_SIZE": 2, **variables, **({} if task is None else {"SLURM_ARRAY_TASK_ID": task})}
    environment = {**os.environ, **{name: str(value) for name, value in own.items()}}
    environment["PATH"] = f"{Path(str(words[1])).parent / 'bin'}:{environment['PATH']}"
    command = ["bash", str(SCRIPT), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def command_of(task: int, *words: object, **variables: object) -> list[str]:
    done = start(task, *words, **variables)
    assert done.returncode == 0, done.stderr
    return shlex.split(done.stdout)


@pytest.mark.parametrize(("shares", "sizes"), [(1, [6]), (2, [4, 2]), (3, [2, 2, 2]), (5, [2, 2, 2, 0, 0])])
def test_shares_are_whole_batches_and_hold_each_prompt_once_with_its_seeds(prompts, tmp_path, shares, sizes):
    found, seeds = [], []
    for task in range(shares):
        words = command_of(task, shares, prompts, tmp_path / "out", "--preset", "fast", SEED=7, NUM_IMAGES=3)
        if not sizes[task]:
            assert " ".join(words) == f"Nothing is left for share {task} of {shares}: 6 prompts in shares of 2."
            continue
        args = cli.build_parser().parse_args(words)
        assert (args.command, args.preset, args.num_images, args.batch_size) == ("evaluate", "fast", 3, 2)
        assert args.output == tmp_path / "out" / f"share-{task:05d}"
        own = Path(args.prompts).read_text().splitlines()
        assert len(own) == sizes[task]
        found += own
        seeds += [args.seed + i for i in range(3 * len(own))]
    assert found == [prompt for prompt in PROMPTS if prompt]
    assert seeds == list(range(7, 7 + 18))


@pytest.mark.parametrize(
    ("task", "words", "said"),
    [
        (
            2,
            [2, "prompts.txt", "out"],
            "SLURM_ARRAY_TASK_ID must be below the number of shares, 2, got 2: use sbatch --array=0-1.",
        ),
        (0, ["two", "prompts.txt", "out"], "SHARES must be a number, got two."),
        (0, [2, "prompts.json", "out"], "PROMPTS must be a .txt or .jsonl file, got {folder}/prompts.json."),
        (0, [2, "others.txt", "out"], "{folder}/others.txt is missing."),
        (0, [2, "prompts.txt"], "usage: slurm_array.sh SHARES PROMPTS OUTPUT [flags of diffusers-infogain evaluate]"),
        (None, [2, "prompts.txt", "out"], "SLURM_ARRAY_TASK_ID: is set by sbatch --array"),
    ],
)
def test_what_cannot_be_shared_is_said(prompts, tmp_path, monkeypatch, task, words, said):
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID", raising=False)
    done = start(task, words[0], *(tmp_path / word for word in words[1:]))
    assert done.returncode != 0
    assert done.stderr.strip().endswith(said.format(folder=tmp_path))
    assert not (tmp_path / "out").exists()


def test_the_images_of_all_shares_are_those_of_one_process(prompts, tmp_path, capsys):
    flags = ["--preset", "fast", "--steps", "8", "--device", "cpu", "--metrics"]
    for task in range(2):
        words = command_of(task, 2, prompts, tmp_path / "out", *flags)
        assert cli.main(words) == 0
    whole = ["evaluate", *flags, "--prompts", str(prompts), "--batch-size", "2", "--output", str(tmp_path / "whole")]
    assert cli.main(whole) == 0
    together = [path.read_bytes() for path in sorted((tmp_path / "out").glob("share-*/images/*.png"))]
    assert len(together) == 6
    assert together == [path.read_bytes() for path in sorted((tmp_path / "whole" / "images").iterdir())]
