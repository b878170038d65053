"""Commands that are killed at any moment, that share their work among processes, and that meet at one output."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.commands import commands

ROOT = Path(__file__).parents[2]

TASK = """
task: tiny
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
output_type: generate_until
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
generation_kwargs:
  until: ["x"]
  max_gen_toks: 8
"""

COMMANDS: dict[str, list[Any]] = {
    "evaluate": ["evaluate", "--num-prompts", 10, "--batch-size", 2, "--steps", 2, "--metrics", "composition"],
    "compare": ["compare", "--num-prompts", 4, "--batch-size", 2, "--steps", 2, "--seeds", 0, 1, "--metrics", "composition"],
    "generate": ["generate", "a red circle", "a blue square", "--num-images", 3, "--batch-size", 2, "--steps", 2, "--grid"],
    "text": ["text", *("S", "M", "S1", "S2", "M1", "M2"), "--num-texts", 2, "--max-new-tokens", 8, "--batch-size", 2],
    "compare-text": ["compare-text", "--tasks", "equation", "--num-problems", 4, "--seeds", 0, 1, "--tokens-per-step", 4],
    "demo": ["demo", "--num-prompts", 2, "--steps", 1],
    "lm-eval": ["lm-eval", "--tasks", "tiny", "--model", "demo-text", "--batch-size", 1],
}
SLOW = ("demo", "lm-eval")
COMMANDS["compare"] += ["--samplers", "maskgit", "default"]
COMMANDS["compare-text"] += ["--samplers", "confidence", "maskgit", "default"]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    (folder / "tasks").mkdir()
    rows = [{"question": f"S{digit}", "answer": "1"} for digit in range(1, 5)]
    (folder / "data.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "tasks" / "tiny.yaml").write_text(TASK.format(data=folder / "data.json"))
    modules = ["diffusers_infogain.cli.lm_eval", "lm_eval.tasks"] if importlib.util.find_spec("lm_eval") else []
    with commands(folder, *modules) as server:
        yield server


def command(server, name: str, output: Path) -> list[Any]:
    if name == "lm-eval" and not importlib.util.find_spec("lm_eval"):
        pytest.skip("needs lm-eval")
    more = ["--include-path", server.folder / "tasks"] if name == "lm-eval" else []
    return [*COMMANDS[name], *more, "--device", "cpu", "--output", output / "texts.jsonl" if name == "text" else output]


PLOTS = ("pareto_rows.png", "pareto_calls.png", "quality_entropy.png", "decisions.png", "entropy_2_steps.png", "samples.jpg")
TIMES = re.compile(r'"(seconds|seconds_per_image|peak_memory|total_evaluation_time_seconds|date)": ("[^"]*"|[^,}\]]+)')


def contents(folder: Path) -> dict[str, bytes | str]:
    """All files by name, without what clocks say; the plots, tables and reports that show it are told by their names only."""
    found: dict[str, bytes | str] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_dir() or path.name.startswith("timing-"):
            continue
        if path.name == "results.json":
            results = json.loads(path.read_text())
            tasks, runs = results.get("results", {}), results.get("runs", [])
            kept = (
                [tasks[task]["exact_match,none"] for task in tasks],
                sorted(runs, key=lambda run: (run["sampler"], run["seed"])),
            )
            found[name] = TIMES.sub("", json.dumps(kept))
        elif path.suffix == ".md" or path.name == "report.json" or path.name in PLOTS:
            found[name] = b""
        elif path.suffix in (".json", ".jsonl"):
            found[name] = TIMES.sub("", path.read_text())
        else:
            found[name] = path.read_bytes()
    return found


@pytest.fixture(scope="module")
def uninterrupted(server, tmp_path_factory):
    made: dict[str, tuple[dict[str, bytes | str], float]] = {}

    def make(name: str):
        if name not in made:
            output = tmp_path_factory.mktemp(name)
            codes, logs = server.run(command(server, name, output))
            assert codes == [0], logs
            made[name] = contents(output), server.seconds
        return made[name]

    return make


def launch(server, name: str, output: Path, **more: Any) -> tuple[list[int], list[str]]:
    """Two processes that share a command's work."""
    return server.run(*[command(server, name, output)] * 2, launched=True, **more)


def interrupt(server, uninterrupted, name: str, output: Path, rng: random.Random, kills: int) -> int:
    """Kills a command several times at random moments, alone and as two processes; returns how often it was really killed."""
    expected, seconds = uninterrupted(name)
    killed, images = 0, {}
    for number in range(kills):
        sent = rng.choice([signal.SIGKILL, signal.SIGTERM])
        moment = {"kill_after": rng.uniform(0.2, 1) * seconds, "signal": sent}
        run_it = launch if number % 2 else lambda server, name, output, **m: server.run(command(server, name, output), **m)
        codes, logs = run_it(server, name, output, **moment)
        assert set(codes) <= {0, -sent, 128 + sent, 2}, logs  # 2: by the end of the other process
        assert not any("Traceback" in log for log in logs)
        killed += any(codes)
        images |= {path: path.stat().st_mtime_ns for path in output.rglob("images/*.png")}
    codes, logs = launch(server, name, output)
    assert codes == [0, 0], logs
    assert logs[1] == ""
    found = contents(output)
    assert found.keys() == expected.keys()
    assert [file for file in expected if found[file] != expected[file]] == []
    assert {path: path.stat().st_mtime_ns for path in images} == images
    return killed


@pytest.mark.parametrize("name", ["text", "compare-text", "evaluate"])
def test_a_killed_command_goes_on_as_two_processes_and_ends_with_the_same_files(server, uninterrupted, name, tmp_path):
    interrupt(server, uninterrupted, name, tmp_path, random.Random(0), kills=2)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*(name for name in COMMANDS if name not in SLOW for _ in range(3)), *SLOW])
def test_commands_killed_many_times_end_with_the_same_files(server, uninterrupted, name, request, tmp_path):
    killed = interrupt(server, uninterrupted, name, tmp_path, random.Random(request.node.nodeid), kills=4)
    print(f"{name}: {killed} of 4 killed")


def meet(server, name: str, output: Path) -> list[int]:
    first, second = command(server, name, output), command(server, name, output)
    codes, logs = server.run(first, second)
    for code, log in zip(codes, logs, strict=True):
        if code:
            assert "Traceback" not in log
            assert f"Another command is writing to {first[-1]}: wait for it to end" in log
    return sorted(codes)


@pytest.mark.parametrize("name", ["text", "compare-text", "evaluate"])
def test_of_two_commands_with_one_output_one_is_refused(server, uninterrupted, name, tmp_path):
    expected, _ = uninterrupted(name)
    assert meet(server, name, tmp_path) == [0, 2]
    assert contents(tmp_path) == expected


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_of_any_two_commands_with_one_output_one_is_refused(server, uninterrupted, name, tmp_path):
    expected, _ = uninterrupted(name)
    assert meet(server, name, tmp_path) == [0, 2]
    assert contents(tmp_path) == expected


@pytest.mark.slow
def test_commands_in_folders_inside_each_other_do_not_meet(server, tmp_path):
    codes, logs = server.run(command(server, "generate", tmp_path), command(server, "evaluate", tmp_path / "evaluation"))
    assert codes == [0, 0], logs


def test_two_processes_make_the_images_of_one_and_those_of_other_settings_are_kept(server, uninterrupted, tmp_path):
    flags = command(server, "generate", tmp_path)
    before, _ = uninterrupted("generate")
    assert launch(server, "generate", tmp_path)[0] == [0, 0]
    assert contents(tmp_path) == before
    assert server.run(flags)[0] == [0]
    assert contents(tmp_path) == before
    assert server.run([*flags, "--guidance-scale", 1.2000001])[0] == [0]
    after = contents(tmp_path)
    assert {name: after[name] for name in before} == before
    assert len(after) == 2 * len(before)
    assert "grid-2.png" in after


def test_two_processes_make_the_comparison_of_one(server, uninterrupted, tmp_path):
    expected, _ = uninterrupted("compare")
    codes, logs = launch(server, "compare", tmp_path)
    assert codes == [0, 0], logs
    assert logs[1] == ""
    assert contents(tmp_path) == expected


def test_two_processes_print_texts_in_the_order_of_one(server, tmp_path):
    flags = ["text", *("S", "M", "S1", "S2", "M1"), "--num-texts", 2, "--max-new-tokens", 8, "--batch-size", 1, "--device", "cpu"]
    codes, alone = server.run([*flags, "--show", "--html", tmp_path / "one.html"])
    assert codes == [0], alone
    codes, logs = server.run(*[[*flags, "--show", "--html", tmp_path / "two.html"]] * 2, launched=True)
    assert codes == [0, 0]
    assert logs == [alone[0], ""]
    assert (tmp_path / "two.html").read_bytes() == (tmp_path / "one.html").read_bytes()


def test_if_one_process_fails_all_end_and_it_says_why(server, tmp_path):
    """The model is opened by each process, whichever takes the batches."""
    flags = command(server, "generate", tmp_path / "images")
    model = tmp_path / "model"
    model.mkdir()
    for rank, last in ((0, ""), (1, " (rank 1)")):
        wrong = [[*flags, "--model", model] if number == rank else flags for number in range(2)]
        codes, logs = server.run(*wrong, launched=True)
        assert codes == [2, 2]
        assert re.fullmatch(rf"diffusers-infogain: error: .*{re.escape(str(model))}.*{re.escape(last)}\n", logs[rank])
        assert logs[1 - rank] == ""
    codes, logs = server.run(*[[*flags, "--steps", 0]] * 2, launched=True)  # found before the processes meet
    assert codes == [2, 2]
    assert "--steps: must be an integer >= 1, got 0" in logs[0]
    assert logs[1] == ""


def test_the_first_of_two_processes_that_are_terminated_says_so(server, uninterrupted, tmp_path):
    _, seconds = uninterrupted("evaluate")
    codes, logs = launch(server, "evaluate", tmp_path, kill_after=0.3 * seconds, signal=signal.SIGTERM)
    assert codes == [143, 143]
    assert sorted(logs) == ["", "diffusers-infogain: terminated\n"]


def test_a_command_that_is_not_shared_runs_in_the_main_process(server):
    codes, logs = server.run(*[["samplers"]] * 3, launched=True)
    assert codes == [0, 0, 0]
    assert logs[1:] == ["", ""]
    note, first, *_ = logs[0].splitlines()
    assert note == "diffusers-infogain: samplers runs in one process, and the other 2 have nothing to do."
    assert first == "Samplers (--sampler):"


def accelerate(*words: Any) -> subprocess.CompletedProcess:
    """Two processes of `accelerate launch`."""
    # `--cpu` would start one process only; the processes themselves are told to use the CPU.
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    launcher += ["--mixed_precision", "no", "--dynamo_backend", "no", *map(str, words)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(launcher, env=environment, capture_output=True, text=True, timeout=300)


def test_processes_of_accelerate_meet(tmp_path):
    """Twice, as a script may run several commands; the command itself is launched in the slow suite."""
    script = tmp_path / "script.py"
    script.write_text(
        "from diffusers_infogain.processes import joined\n"
        "for number in range(2):\n"
        "    with joined() as own:\n"
        "        value = own.from_main(number if own.is_main else None)\n"
        "        assert own.count == 2 and own._take('share', 0) in (0, 1)\n"
        "print(f'{own.index}: {value}\\n', end='', flush=True)\n"
    )
    done = accelerate(script)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.split("\n")) == ["", "0: 1", "1: 1"]


@pytest.mark.slow
def test_accelerate_launches_the_command(server, uninterrupted, tmp_path):
    expected, _ = uninterrupted("generate")
    done = accelerate("-m", "diffusers_infogain.cli", *command(server, "generate", tmp_path))
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path) == expected
    assert done.stdout.count("Written to") == 1
