"""`diffusers-infogain app` as a process: it begins, ends, and leaves nothing."""

from __future__ import annotations

import functools
import os
import re
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from helpers.commands import run

APP = ("-m", "diffusers_infogain.cli", "app")


def start(folder: Path, *arguments: str, program: tuple[str, ...] = APP, **variables: str) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TMPDIR": str(folder / "tmp")}
    environment |= {"PYTHONPATH": str(Path(__file__).parents[2]), **variables}
    (folder / "tmp").mkdir()
    command = [sys.executable, *program, *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    # A shell that runs the tests in the background has them, and so the command, ignore SIGINT.
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(command, cwd=folder, env=environment, text=True, preexec_fn=heed, **pipes)


def address_of(process: subprocess.Popen) -> str:
    line = process.stdout.readline()
    found = re.search(r"http://\S+", line)
    assert found, line + process.stderr.read()
    return found.group()


@pytest.mark.parametrize(("number", "code", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")])
def test_an_interruption_ends_it_and_leaves_no_file(tmp_path, number, code, word):
    pytest.importorskip("gradio", reason="the page needs the extra app")
    process = start(tmp_path, "--port", "0")
    try:
        with urllib.request.urlopen(address_of(process)) as answer:
            assert answer.status == 200
            assert "Info-gain sampling" in answer.read().decode()
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == code
    assert errors == f"diffusers-infogain: {word}\n"
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    assert [path.name for path in tmp_path.iterdir()] == ["tmp"]


def test_what_is_missing_is_said_before_a_model_is_loaded(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    code, out, err = run(capsys, "app", "--model", "no/such/model")
    assert (code, out) == (2, "")
    assert err == "diffusers-infogain: error: The page needs gradio: in a clone of this package, pip install -e '.[app]'.\n"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "/no/such/folder"], "/no/such/folder"),
        (["--host", "no host"], "--host must be an address or a name of this machine, got 'no host'."),
        (["--port", "70000"], "argument --port: must be an integer from 0 to 65535, got 70000"),
        (["--share", "maybe"], "argument --share: invalid choice: 'maybe' (choose from"),
        (["--max-steps", "0"], "argument --max-steps: must be an integer >= 1, got 0"),
        (["--variant", "fp16", "--model", "demo-text"], "--variant does not apply to InfoGainTextPipeline"),
    ],
)
def test_wrong_flags_get_one_sentence(capsys, flags, message):
    pytest.importorskip("gradio", reason="the page needs the extra app")
    code, out, err = run(capsys, "app", "--port", "0", *flags)
    assert (code, out) == (2, "")
    assert message in err
    assert len(err.splitlines()) == 1
