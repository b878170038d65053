"""`convert` that is killed, that has no room, or that is not alone: nothing half is left, and nobody's work is removed."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from filelock import FileLock
from helpers.checkpoints_text import write_llada

import diffusers_infogain
from diffusers_infogain import load
from diffusers_infogain.cli import main


@pytest.fixture(scope="module")
def llada(tmp_path_factory) -> Path:
    return write_llada(tmp_path_factory.mktemp("published") / "llada")


def files_of(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_what_a_killed_run_left_is_taken_over(llada, tmp_path, capsys):
    assert main(["convert", str(llada), str(tmp_path / "alone")]) == 0, capsys.readouterr().err
    left = tmp_path / ".out.part"
    (left / "model").mkdir(parents=True)
    for name in (".lock", "model/model-00001.safetensors", "model_index.json", "other.txt"):
        (left / name).write_text("left")
    assert main(["convert", str(llada), str(tmp_path / "out")]) == 0, capsys.readouterr().err
    assert sorted(os.listdir(tmp_path)) == ["alone", "out"]
    assert files_of(tmp_path / "out") == files_of(tmp_path / "alone")
    assert load(tmp_path / "out")


def test_a_run_that_is_still_writing_is_left_alone(llada, tmp_path, capsys):
    other = tmp_path / ".out.part"
    (other / "model").mkdir(parents=True)
    with FileLock(other / ".lock"):
        assert main(["convert", str(llada), str(tmp_path / "out")]) == 2
        assert f"Another command is writing {tmp_path / 'out'}" in capsys.readouterr().err
        assert (other / "model").is_dir()


def interrupt_first_lock(monkeypatch, locked: bool) -> None:
    """Lets Ctrl-C come just before or after the first lock is taken."""
    acquire, interruptions = FileLock.acquire, [KeyboardInterrupt]

    def interrupted(lock, *args, **more):
        if locked or not interruptions:
            acquire(lock, *args, **more)
        if interruptions:
            raise interruptions.pop()

    monkeypatch.setattr(FileLock, "acquire", interrupted)


@pytest.mark.parametrize("locked", [False, True], ids=["before", "after"])
def test_an_interruption_around_the_lock_leaves_nothing(llada, tmp_path, monkeypatch, locked):
    interrupt_first_lock(monkeypatch, locked)
    assert main(["convert", str(llada), str(tmp_path / "out")]) == 130
    assert os.listdir(tmp_path) == []
    assert main(["convert", str(llada), str(tmp_path / "out")]) == 0


def test_an_interruption_leaves_the_folder_of_another_run_alone(llada, tmp_path, monkeypatch):
    other = tmp_path / ".out.part"
    (other / "model").mkdir(parents=True)
    with FileLock(other / ".lock"):
        interrupt_first_lock(monkeypatch, locked=False)
        assert main(["convert", str(llada), str(tmp_path / "out")]) == 130
        assert (other / "model").is_dir()


@pytest.mark.parametrize(("umask", "folder", "file"), [(0o022, 0o755, 0o644), (0o027, 0o750, 0o640), (0o077, 0o700, 0o600)])
def test_the_rights_are_those_that_the_umask_leaves(llada, tmp_path, umask, folder, file):
    before = os.umask(umask)
    try:
        assert main(["convert", str(llada), str(tmp_path / "out")]) == 0
    finally:
        os.umask(before)
    for path in (tmp_path / "out", *(tmp_path / "out").rglob("*")):
        assert path.stat().st_mode & 0o777 == (folder if path.is_dir() else file), path


@pytest.mark.parametrize("room", [10, 600, 3000, 10_000])
def test_without_room_there_is_one_sentence_and_nothing_left(llada, tmp_path, room, capsys):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        code = main(["convert", str(llada), str(tmp_path / "out")])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    error = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert code == 2
    assert len(error) == 1
    assert f"Cannot write '{tmp_path / '.out.part'}/" in error[0]
    assert os.listdir(tmp_path) == []


def test_a_target_that_cannot_be_made_is_named(llada, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["convert", str(llada), str(tmp_path / "file" / "out")]) == 2
    assert f"{tmp_path / 'file' / 'out'}" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize("delay", [0, 0.02, 0.1, 0.5])
def test_kills(llada, tmp_path, ending, delay):
    command = [sys.executable, "-m", "diffusers_infogain.cli", "convert", str(llada), str(tmp_path / "out")]
    root = str(Path(diffusers_infogain.__file__).parents[1])
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": root}, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    while process.poll() is None and not (tmp_path / ".out.part").exists():
        time.sleep(0.001)
    time.sleep(delay)
    process.send_signal(ending)
    process.communicate(timeout=60)
    left = set(os.listdir(tmp_path))
    if ending == signal.SIGTERM:
        assert left <= {"out"}
    if "out" not in left:
        assert main(["convert", str(llada), str(tmp_path / "out")]) == 0
    assert os.listdir(tmp_path) == ["out"]
    assert load(tmp_path / "out")
