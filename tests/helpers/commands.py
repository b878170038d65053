"""Commands in this process, and in processes of their own, which start at once: one process has imported everything and forks."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffusers_infogain import cli

_SERVER = """
import importlib, json, os, pkgutil, signal, sys, time, traceback
import torch
import diffusers_infogain
from diffusers_infogain import cli
from diffusers_infogain.evaluation import measure, photographs, plots, runs, text_comparison
for module in ("compare", "compare_text", "demo", "evaluate", "generate", "text", *sys.argv[1:]):
    importlib.import_module(module if "." in module else f"diffusers_infogain.cli.{module}")
import matplotlib.pyplot, scipy.ndimage
torch.set_num_threads(1)

def start(arguments, log, environment):
    pid = os.fork()
    if pid:
        return pid
    os.environ.update(environment)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    code = 99
    try:
        code = cli.main(arguments)
    except SystemExit as exit:
        code = exit.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

print("ready", flush=True)
for line in sys.stdin:
    job = json.loads(line)
    begun = time.monotonic()
    pids = [start(*command) for command in job["commands"]]
    if job["seconds"] is not None:
        time.sleep(job["seconds"])
        for pid in pids[job["first"]:]:
            os.kill(pid, job["signal"])
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    print(json.dumps([codes, time.monotonic() - begun]), flush=True)
"""


class Commands:
    """Runs commands of `diffusers-infogain`, several at once, as processes of a launcher, or killed after some time."""

    def __init__(self, process: subprocess.Popen, folder: Path):
        self.process, self.folder = process, folder
        self.seconds = 0.0
        """What the last job took."""

    def run(
        self, *commands: list[Any], kill_after: float | None = None, signal: int = 9, first: int = 0, launched: bool = False
    ) -> tuple[list[int], list[str]]:
        """Exit codes (negative: by a signal), and what the commands said.

        Args:
            first: Of the commands that are killed; those before it live on.
            launched: Whether they share their work, as processes of one launcher.
        """
        logs = [self.folder / f"log-{number}" for number in range(len(commands))]
        for log in logs:
            log.unlink(missing_ok=True)
        port = _free_port() if launched else 0
        started = [
            ([str(word) for word in command], str(log), _variables(rank, len(commands), port) if launched else {})
            for rank, (command, log) in enumerate(zip(commands, logs, strict=True))
        ]
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        job = {"commands": started, "seconds": kill_after, "signal": signal, "first": first}
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        codes, self.seconds = json.loads(self.process.stdout.readline())
        return codes, [log.read_text() for log in logs]


def _free_port() -> int:
    with socket.socket() as some:
        some.bind(("127.0.0.1", 0))
        return some.getsockname()[1]


def _variables(rank: int, count: int, port: int) -> dict[str, str]:
    """What `accelerate launch` and `torchrun` tell a process."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return {name: str(value) for name, value in names.items()}


@contextmanager
def commands(folder: Path, *modules: str) -> Iterator[Commands]:
    """A process that is ready to run commands; `modules` are imported by it too."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    environment["HF_DATASETS_CACHE"] = str(folder / "datasets")
    environment["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # as `cli.main` does before torch is imported, which has happened here
    process = subprocess.Popen(
        [sys.executable, "-c", _SERVER, *modules], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield Commands(process, folder)
    finally:
        process.kill()
        process.communicate()


def run(capsys, *arguments) -> tuple[int, str, str]:
    """A command in this process: its exit code, and what it prints on stdout and stderr."""
    try:
        code = cli.main([str(argument) for argument in arguments])
    except SystemExit as stopped:  # argparse
        code = stopped.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err
