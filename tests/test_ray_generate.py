"""examples/ray_generate.py on a cluster within this machine, of which a part is lost."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest
import torch

from diffusers_infogain import InfoGainPipeline, InfoGainScheduler

EXAMPLE = Path(__file__).parents[1] / "examples" / "ray_generate.py"
PROMPTS = ("a red circle", "two green squares", "a cyan square above a purple circle")
IMAGES, BATCH, SEED = 11, 3, 5  # batches of two prompts are among them
FLAGS = ("--num-images", IMAGES, "--batch-size", BATCH, "--seed", SEED, "--sampler", "halton:entropy_bound=0", "--steps", 16)

pytestmark = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason='needs pip install "ray[data]"')


@pytest.fixture
def cluster(monkeypatch) -> Iterator[Any]:
    """Three nodes: one for the command, which has no CPU for workers, and two with one CPU each."""
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    from ray.cluster_utils import Cluster

    soon_missed = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 4}
    head = {"num_cpus": 0, "include_dashboard": False, "_system_config": soon_missed}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    for _ in range(2):
        cluster.add_node(num_cpus=1)
    yield cluster
    cluster.shutdown()


@pytest.fixture
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ray_generate", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def start(cluster: Any, output: Path, prompts: Path) -> subprocess.Popen[str]:
    """The example, which begins with the first batch when both workers have loaded the model."""
    own = {"OMP_NUM_THREADS": "1", "RAY_ADDRESS": cluster.address, "RAY_DATA_DEFAULT_WAIT_FOR_MIN_ACTORS_S": "100"}
    command = [sys.executable, EXAMPLE, output, "--prompts", prompts, *FLAGS]
    environment = {**os.environ, **own}
    return subprocess.Popen(list(map(str, command)), env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait(process: subprocess.Popen[str], condition: Callable[[], Any]) -> None:
    """Returns once something is so, while the command runs."""
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)


def is_painting(node: Any) -> bool:
    """Whether the worker of a node is at a batch, as the title of its process says."""
    titles = []
    for process in psutil.Process(node.all_processes["raylet"][0].process.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            titles.append(" ".join(process.cmdline()))
    return any("Painter" in title and "submit" in title for title in titles)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As many as a worker has: with another number, kernels round differently."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def single_process(pipe: InfoGainPipeline) -> dict[str, bytes]:
    """The files of a loop over the same batches."""
    pipe.scheduler = InfoGainScheduler.from_config(pipe.scheduler.config, sampler="halton", entropy_bound=0)
    prompts = [prompt for prompt in PROMPTS for _ in range(IMAGES)]
    files = {}
    for first in range(0, len(prompts), BATCH):
        generators = [torch.Generator().manual_seed(SEED + first + i) for i in range(BATCH)]
        images = pipe(prompts[first : first + BATCH], num_inference_steps=16, generator=generators).images
        for index, image in enumerate(images, first):
            content = io.BytesIO()
            image.save(content, "PNG")
            files[f"{index:06d}.png"] = content.getvalue()
    return files


def test_after_a_killed_command_and_a_lost_machine_images_are_those_of_a_single_process(cluster, one_thread, tmp_path):
    output, prompts = tmp_path / "out", tmp_path / "prompts.csv"
    prompts.write_text("\n".join(["number,prompt", *(f"{number},{prompt}" for number, prompt in enumerate(PROMPTS))]))

    def there() -> list[Path]:
        return sorted(output.glob("images/*.png"))

    killed = start(cluster, output, prompts)
    wait(killed, lambda: len(there()) > 3)
    killed.kill()
    killed.communicate()
    damaged, *whole = there()
    damaged.write_bytes(damaged.read_bytes()[:-20])
    before = {path: path.stat().st_mtime_ns for path in whole}
    assert 3 <= len(whole) < 30

    lost = cluster.list_all_nodes()[-1]
    process = start(cluster, output, prompts)
    wait(process, lambda: len(there()) > len(before) + 1 and is_painting(lost))
    cluster.remove_node(lost, allow_graceful=False)
    said, _ = process.communicate(timeout=200)
    assert process.returncode == 0, said
    assert f"\n{33 - len(before)} of 33 images in " in said
    assert {path: path.stat().st_mtime_ns for path in whole} == before

    pipe = InfoGainPipeline.from_pretrained("demo")
    pipe.set_progress_bar_config(disable=True)
    expected = single_process(pipe)
    assert len(expected) == 33
    assert {path.name: path.read_bytes() for path in (output / "images").iterdir()} == expected
    assert len((output / "images.jsonl").read_text().splitlines()) == 33


def test_prompts_are_read_from_tables(example, tmp_path):
    pandas = pytest.importorskip("pandas")
    table, texts = pandas.DataFrame({"id": [7, 8], "prompt": ["a dog, asleep", "NA"]}), tmp_path / "texts.txt"
    table.to_csv(tmp_path / "a.csv", index=False)
    table.to_parquet(tmp_path / "a.parquet")
    texts.write_text("a dog, asleep\nNA\n")
    for file in (tmp_path / "a.csv", tmp_path / "a.parquet", texts):
        assert [prompt.text for prompt in example.prompts_of(file)] == ["a dog, asleep", "NA"]


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_tables_without_prompts_are_refused(example, tmp_path, suffix):
    pandas = pytest.importorskip("pandas")
    file = tmp_path / f"a{suffix}"

    def error(values: dict[str, list[Any]]) -> str:
        table = pandas.DataFrame(values)
        table.to_csv(file, index=False) if suffix == ".csv" else table.to_parquet(file)
        with pytest.raises(ValueError) as caught:
            example.prompts_of(file)
        return str(caught.value)

    assert error({"caption": ["a dog"]}).startswith(f'{file} must be a {suffix} file with the column "prompt": ')
    assert error({"id": [1, 2], "prompt": ["a dog", ""]}) == f"Row 2 of {file} must have a text as its prompt, got ''."
    assert error({"prompt": []}) == f"{file} holds no prompts."


@pytest.mark.slow
def test_the_benchmark_compares_ray_with_a_loop():
    command = [sys.executable, EXAMPLE.with_name("benchmark_ray.py"), "--num-images", 6, "--batch-size", 2, "--repeats", 1]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
    assert re.search(r"^loop: 6 images, .*^ray: 6 images, .*^ratio of ray to loop: \d", done.stdout, re.MULTILINE | re.DOTALL)
