"""How commands end when something is wrong: one sentence, an exit code, no traceback."""

from __future__ import annotations

import errno
import importlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers.commands import run
from safetensors import SafetensorError

from diffusers_infogain import cli
from diffusers_infogain.cli import device, errors, flags

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
COMMAND = [sys.executable, "-m", "diffusers_infogain.cli"]


def parsed(*arguments: str):
    return cli.build_parser().parse_args(arguments)


def failing(monkeypatch, error: BaseException) -> None:
    """Lets `exact` fail in the middle."""

    def fail(*arguments, **more):
        raise error

    monkeypatch.setattr("diffusers_infogain.evaluation.exact.compare_exact", fail)


def integer_flags() -> list[tuple[str, str]]:
    """(command, flag) of every flag that takes a number, found in the parsers themselves."""
    found = []
    (commands,) = [action for action in cli.build_parser()._actions if action.dest == "command"]
    for command, parser in commands.choices.items():
        for action in parser._actions:
            if getattr(action.type, "func", None) is flags._number:
                found.append((command, action.option_strings[0]))
    return found


REQUIRED = {"lm-eval": ["--model", "x", "--tasks", "x"], "convert": ["source", "target"], "export": ["model", "folder"]}
WRONG_NUMBERS = ("nan", "inf", "-inf", "1e308", str(2**63), str(-(2**63)), "9" * 5000, "", "x", "0x10", "1,5", "\u00bd")


def test_the_numbers_are_found():
    assert len(integer_flags()) > 60
    assert ("convert", "--max-shard-size") in integer_flags()
    untyped = []
    (commands,) = [action for action in cli.build_parser()._actions if action.dest == "command"]
    for command, parser in commands.choices.items():
        untyped += [(command, a.dest) for a in parser._actions if a.nargs != 0 and a.type is None and not a.choices]
    assert untyped == [], "every flag has a type that checks it, or choices"


@pytest.mark.parametrize("value", WRONG_NUMBERS, ids=lambda value: value[:12] or "empty")
def test_wrong_numbers_are_told_with_their_flag(capsys, value):
    parser = cli.build_parser()
    for command, flag in integer_flags():
        with pytest.raises(SystemExit) as stopped:
            parser.parse_args([command, *REQUIRED.get(command, []), f"{flag}={value}"])
        err = capsys.readouterr().err
        assert stopped.value.code == 2, (command, flag)
        assert f"argument {flag}" in err, (command, flag, err)
        assert "must be a" in err, err
        assert len(err) < 500


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "a", "--output", ""], "argument --output: must be a non-empty path, got ''"),
        (["generate", "a", "--output", "a\0b"], "argument --output: must be a non-empty path, got 'a\\x00b'"),
        (["generate", "a", "--model", ""], "argument --model: must be a non-empty name, got ''"),
        (["generate", "a\udcff"], "argument prompts: must be text in UTF-8, got 'a\\udcff'"),
        (["text", "a", "--prompts-file", ""], "argument --prompts-file: must be a non-empty path"),
        (["generate", "a", "--dtype", "float8"], "argument --dtype: invalid choice: 'float8' (choose from"),
        (["generate", "a", "--seed", "-1"], "argument --seed: must be an integer >= 0, got -1"),
        (["convert", "a", "b", "--max-shard-size", "0"], "argument --max-shard-size: must be a number in [0.001, 1e+06], got 0"),
    ],
)
def test_wrong_flags_are_told_by_name(capsys, arguments, message):
    code, _, err = run(capsys, *arguments)
    assert code == 2
    assert message in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("target", ["b/" * 3000, "x" * 100_000], ids=["path", "name"])
def test_very_long_paths_are_cut_off(capsys, tmp_path, target):
    code, _, err = run(capsys, "convert", tmp_path, target)
    assert code == 2
    assert len(err.splitlines()) == 1
    assert len(err) < 500


@pytest.mark.parametrize("number", [errno.ENAMETOOLONG, errno.ENOSPC])
def test_long_names_in_errors_of_the_system_are_cut_off(number):
    sentence, code = errors.explain(OSError(number, os.strerror(number), "x" * 100_000), None)
    assert code == 2
    assert "'xxx" in sentence
    assert len(sentence) < 500


NO_DEVICES = ("cuda:99", "cuda:-1", "xpu:7", "meta", "gpu", "cpu:3", "CPU", "0", "cuda:", "cpu,cuda", "npu")


@pytest.mark.parametrize(("command", "name"), [*(("text", name) for name in NO_DEVICES), ("compare", "gpu"), ("demo", "gpu")])
def test_devices_that_are_not_there_are_told_before_anything_is_loaded(capsys, tmp_path, command, name):
    output = tmp_path / "out"
    code, _, err = run(capsys, command, *(["a"] if command == "text" else []), "--device", name, "--output", output)
    assert code == 2
    there = ", ".join(device.usable_devices())
    assert err.startswith(f"diffusers-infogain: error: --device must be one of {there} on this machine, got {name!r}")
    assert len(err.splitlines()) == 1
    assert not output.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without CUDA")
def test_the_default_device_is_what_is_there():
    assert device.choose_device(None) == "cpu"
    with pytest.raises(ValueError, match="--device must be one of cpu on this machine, got 'cuda'"):
        device.choose_device("cuda")


def test_each_process_gets_the_device_of_its_number(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert device.own_device("cuda") == "cuda"  # the launcher shows each process only its own
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert [device.own_device(name) for name in ("cuda", "cuda:0", "cpu")] == ["cuda:1", "cuda:0", "cpu"]
    assert chosen == [1]
    monkeypatch.setenv("LOCAL_RANK", "2")
    message = (
        "The launcher must start at most 2 processes here, one for each device of --device cuda, got more: lower their number"
    )
    with pytest.raises(ValueError, match=message):
        device.own_device("cuda")


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried 9 bytes."),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."),
        RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ],
    ids=str,
)
def test_out_of_memory_names_the_flags_that_lower_it(error):
    sentence, code = errors.explain(error, parsed("generate", "a", "--lookahead-batch-size", "64"))
    assert code == 2
    assert sentence.startswith(
        "out of memory: lower --lookahead-batch-size (now 64), --batch-size (now 8), or use --dtype bfloat16."
    )
    sentence, _ = errors.explain(error, parsed("text", "a", "--dtype", "bfloat16"))
    assert sentence.startswith("out of memory: lower --lookahead-batch-size (not set), --batch-size (now 8), --max")


def test_the_cpu_allocators_own_error_is_known():
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**60, dtype=torch.uint8)
    assert errors.explain(raised.value, None)[0].startswith("out of memory.")


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "a.png"), "no space left on the disk for 'a.png'."),
        (OSError(errno.ENOSPC, "No space left on device"), "no space left on the disk for 'folder'."),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "no space left on the disk for 'folder'."),
        (SafetensorError("HeaderTooLarge"), "HeaderTooLarge"),
        (PermissionError(errno.EACCES, "Permission denied", "a.png"), "Permission denied: 'a.png'"),
    ],
    ids=str,
)
def test_errors_of_files_name_them(error, sentence):
    assert errors.explain(error, parsed("convert", "a", "folder")) == (sentence, 2)


def test_a_mistake_of_the_package_asks_for_a_report_and_its_traceback_can_be_had(capsys, monkeypatch):
    failing(monkeypatch, KeyError("x"))
    code, _, err = run(capsys, "exact")
    assert code == 70
    assert err == (
        "diffusers-infogain: error: this is a bug in diffusers-infogain; please report it with the output of "
        "DIFFUSERS_INFOGAIN_TRACEBACK=1: KeyError: 'x'\n"
    )
    monkeypatch.setenv("DIFFUSERS_INFOGAIN_TRACEBACK", "1")
    code, _, err = run(capsys, "exact")
    assert code == 70
    assert err.startswith("Traceback (most recent call last):")
    failing(monkeypatch, ValueError("a\nb " + "c" * 5000))
    monkeypatch.delenv("DIFFUSERS_INFOGAIN_TRACEBACK")
    code, _, err = run(capsys, "exact")
    assert code == 2
    assert err.startswith("diffusers-infogain: error: a b ccc")
    assert len(err) < 2100


def test_an_interruption_has_its_own_code(capsys, monkeypatch):
    failing(monkeypatch, KeyboardInterrupt())
    assert run(capsys, "exact") == (130, "", "diffusers-infogain: interrupted\n")


def usual_handler(request, number):
    """Python's own, which a shell that starts the tests in the background replaces; returned, and left behind as it was."""
    handler = signal.default_int_handler if number == "SIGINT" else signal.SIG_DFL
    before = signal.signal(signal.Signals[number], handler)
    request.addfinalizer(lambda: signal.signal(signal.Signals[number], before))
    return handler


SIGNALS = pytest.mark.parametrize(("number", "code", "word"), [("SIGTERM", 143, "terminated"), ("SIGINT", 130, "interrupted")])


@SIGNALS
def test_a_signal_cleans_up_before_the_end(number, code, word, capsys, monkeypatch, request):
    cleaned, before = [], usual_handler(request, number)

    def wait(*arguments):
        try:
            os.kill(os.getpid(), signal.Signals[number])
            time.sleep(30)
        finally:
            cleaned.append(True)

    monkeypatch.setattr("diffusers_infogain.evaluation.exact.compare_exact", wait)
    assert run(capsys, "exact") == (code, "", f"diffusers-infogain: {word}\n")
    assert cleaned == [True]
    assert signal.getsignal(signal.Signals[number]) == before


@SIGNALS
def test_a_signal_that_a_library_turns_into_an_error_of_its_own_is_no_error(number, code, word, capsys, monkeypatch, request):
    """torch.tensor asks a sequence for its length, and whatever that raises, reports a TypeError."""
    usual_handler(request, number)

    class Sequence:
        def __getitem__(self, index):
            return 0

        def __len__(self):
            os.kill(os.getpid(), signal.Signals[number])
            return 1

    def load(*arguments):
        with pytest.raises(TypeError):
            torch.tensor(Sequence())
        torch.tensor(Sequence())

    monkeypatch.setattr("diffusers_infogain.evaluation.exact.compare_exact", load)
    assert run(capsys, "exact") == (code, "", f"diffusers-infogain: {word}\n")


@pytest.mark.parametrize("arguments", [["samplers"], ["--help"], ["generate", "--help"]], ids=" ".join)
def test_a_reader_that_goes_away_is_no_error(arguments):
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([*COMMAND, *arguments], stdout=write, stderr=subprocess.PIPE, env=ENVIRONMENT, text=True)
    os.close(write)
    assert done.returncode in (0, 141)
    assert done.stderr == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_output_that_cannot_be_written_is_told():
    with open("/dev/full", "w") as full:
        done = subprocess.run([*COMMAND, "samplers"], stdout=full, stderr=subprocess.PIPE, env=ENVIRONMENT, text=True)
    assert done.returncode == 2
    assert done.stderr == "diffusers-infogain: error: no space left on the disk for the output.\n"


def test_every_command_can_be_run_by_its_name():
    for command in cli.COMMANDS:
        module, function = command.function.split(".")
        assert callable(getattr(importlib.import_module(f"diffusers_infogain.cli.{module}"), function))


def test_flags_of_the_other_kind_of_model_are_not_shown(capsys):
    _, images, _ = run(capsys, "generate", "--help")
    _, texts, _ = run(capsys, "text", "--help")
    for flag in ("--pc-frequencies", "--pc-decay", "--pc-clip", "--max-new-tokens", "--block-length", "--cache"):
        assert flag not in images
        assert flag in texts
    for flag in ("--halton-randomize", "--guidance-schedule", "--height"):
        assert flag in images
        assert flag not in texts


def test_samplers_are_listed_with_a_line_each(capsys):
    from diffusers_infogain import choices
    from diffusers_infogain.rules import SAMPLERS
    from diffusers_infogain.scheduling_infogain import InfoGainScheduler

    code, out, _ = run(capsys, "samplers")
    assert code == 0
    assert tuple(choices.SAMPLER_DESCRIPTIONS) == tuple(SAMPLERS)
    for name in SAMPLERS:
        assert sum(line.startswith(f"  {name} ") for line in out.splitlines()) == 1
        InfoGainScheduler(mask_token_id=1, sampler=name)
    assert set(choices.PRESET_DESCRIPTIONS) == set(choices.PRESETS)
    assert set(flags.DEFAULT_SAMPLERS) <= {*SAMPLERS, *choices.PRESETS}


def test_without_a_command_all_are_listed(capsys):
    code, _, err = run(capsys)
    assert code == 2
    for command in cli.COMMANDS:
        assert f"  {command.name}" in err
        assert "\n" not in command.summary


def test_two_dashes_are_no_value(capsys):
    with pytest.raises(SystemExit):
        cli.main(["compare", "--model=--"])
    assert "error: argument --model: expected a value, got '--'" in capsys.readouterr().err
