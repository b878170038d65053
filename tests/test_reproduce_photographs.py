"""examples/reproduce_photographs.sh, with commands that stand in for the real ones, and as a whole on tiny models."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.photographs import write_coco, write_commands, write_families
from PIL import Image

from diffusers_infogain import InfoGainScheduler, cli
from diffusers_infogain.evaluation.prompts import read_prompts
from diffusers_infogain.evaluation.samplers import parse_sampler
from diffusers_infogain.models.imagenet import imagenet_class_ids

EXAMPLES = Path(__file__).parents[1] / "examples"
FAMILIES = (
    "amused_256",
    "amused_512",
    "meissonic",
    "monetico",
    "maskgit_256",
    "maskgit_384",
    "titok_l32",
    "titok_s128",
    "mmada",
    "showo_256",
    "showo_512",
    "lumina",
)
NO_FRECHET = bool(importlib.util.find_spec("torch_fidelity") and not importlib.util.find_spec("torchvision"))


def start(folder: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """The script, with the commands in the folder bin and what it writes in the folder out."""
    own = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    own |= {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", **environment}
    command = ["bash", str(EXAMPLES / "reproduce_photographs.sh"), str(folder / "out")]
    return subprocess.run(command, capture_output=True, text=True, env=own)


@pytest.fixture
def stand_ins(tmp_path):
    """`python`, which says that the GPU has 16 GiB, and `diffusers-infogain`, which notes its words and, where they hold the
    name of a file of exit codes, ends with the code in it."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "codes").mkdir()
    said = tmp_path / "said"
    command = f"""#!/bin/bash
printf '%s ' "${{@@Q}}" >>{said}; echo >>{said}
for code in {tmp_path}/codes/*; do
    case "$*" in *"${{code##*/}}"*) echo "error: $(cat "$code")"; exit "$(cat "$code")" ;; esac
done
while [ $# -gt 0 ]; do [ "$1" != --save-statistics ] || touch "$2"; shift; done
"""
    for name, text in (("python", '#!/bin/sh\n[ "$1" != -c ] || echo 16\n'), ("diffusers-infogain", command)):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    return tmp_path


def commands_of(folder: Path) -> list[list[str]]:
    return [shlex.split(line) for line in (folder / "said").read_text().splitlines()]


def test_every_family_has_a_page_and_an_fid_with_flags_that_parse(stand_ins):
    coco = write_coco(stand_ins / "coco", 2)
    (stand_ins / "out" / "coco" / "images").mkdir(parents=True)
    done = start(
        stand_ins, {**coco, "FID": "5000", "METRICS": "hps_v2_1 pick_score", "IMAGENET": str(stand_ins / "imagenet.npz")}
    )
    assert done.returncode == 0, done.stderr
    parsed = [cli.build_parser().parse_args(words) for words in commands_of(stand_ins)]
    assert parsed[0].command == "evaluate"
    comparisons = {(args.output.parent.name, args.output.name): args for args in parsed[1:]}
    assert set(comparisons) == {(family, part) for family in FAMILIES for part in ("page", "fid")}
    for (family, part), args in comparisons.items():
        for text in args.samplers:
            InfoGainScheduler(mask_token_id=4, **parse_sampler(text).scheduler)
        assert "published" not in args.samplers
        named = {"mmada": "showo", "showo": "showo", "titok": "titok"}
        assert args.samplers[0].startswith(named.get(family.partition("_")[0], "maskgit"))
        assert len(args.samplers) == len(set(args.samplers)) >= (6 if part == "page" else 4)
        images = args.num_images * (min(1000, args.num_prompts) if family.startswith(("maskgit", "titok")) else args.num_prompts)
        assert images == (16 if part == "page" else 5000)
        assert (args.reference is None) == (part == "page")
        judged = [] if part == "fid" and family.startswith(("maskgit", "titok")) else ["hps_v2_1", "pick_score"]
        assert args.metrics == ([] if part == "page" else ["frechet"]) + judged
        assert args.offload == (family in ("mmada", "lumina"))  # they do not fit into 16 GiB
        assert args.batch_size == 1 or not args.offload
        assert (args.negative_prompt is not None) == (family in ("meissonic", "monetico"))
        assert (args.text_encoder is not None) == (family == "meissonic")
    assert comparisons["maskgit_384", "page"].variant == "384_large"
    assert comparisons["maskgit_256", "fid"].guidance_scales == [0.7]


def test_the_prompts_suit_the_families():
    assert len(read_prompts(EXAMPLES / "photographs" / "prompts.txt")) == 16
    names = [prompt.text for prompt in read_prompts(EXAMPLES / "photographs" / "classes.txt")]
    assert len(set(imagenet_class_ids(names))) == 16


def test_what_fails_is_named_at_the_end_and_the_rest_is_made(stand_ins):
    (stand_ins / "codes" / "monetico").write_text("2")
    done = start(stand_ins, {"FAMILIES": "monetico nonsense mmada", "MODEL_monetico": "monetico"})
    assert done.returncode == 1
    assert done.stderr.splitlines()[-2:] == ["monetico page", "nonsense settings"]
    assert "FAMILIES must be among amused_256 " in done.stdout
    assert [words[words.index("--model") + 1] for words in commands_of(stand_ins)] == ["monetico", "Gen-Verse/MMaDA-8B-MixCoT"]
    assert (stand_ins / "out" / "logs" / "monetico-page.log").read_text() == "error: 2\n"


@pytest.mark.parametrize("code", [130, 143])
def test_an_interruption_ends_everything(stand_ins, code):
    (stand_ins / "codes" / "amused-512").write_text(str(code))
    assert start(stand_ins, {}).returncode == code
    assert len(commands_of(stand_ins)) == 2


def test_settings_for_all_families_take_the_place_of_their_own(stand_ins):
    own = {"STEPS": "2", "SIZE": "64", "DTYPE": "float32", "BATCH_SIZE": "3", "OFFLOAD": "0", "SAMPLERS": "fast published"}
    assert start(stand_ins, {**own, "DEVICE": "cpu", "PROMPTS": "2"}).returncode == 0
    for words in commands_of(stand_ins):
        args = cli.build_parser().parse_args(words)
        assert (args.steps, args.dtype, args.batch_size, args.device, args.grid) == ([2], "float32", 3, "cpu", 2)
        assert args.height == args.width == (None if re.search("MaskGIT|titok|show-o", args.model) else 64)
        assert not args.offload
        assert args.samplers[0] == "fast"


@pytest.mark.slow
def test_pages_of_tiny_models_are_made_and_nothing_is_made_twice(tmp_path):
    environment = {**write_families(tmp_path / "models"), "DEVICE": "cpu", "STEPS": "2", "SIZE": "64", "PROMPTS": "2"}
    environment |= {"SAMPLERS": "published default", "DTYPE": "float32"}
    if not NO_FRECHET:
        environment |= {**write_coco(tmp_path / "coco", 6), "FID": "4", "FEATURES": "demo", "FID_SAMPLERS": "fast"}
        environment["IMAGENET"] = str(tmp_path / "coco" / "val")
    write_commands(tmp_path / "bin")
    done = start(tmp_path, {**environment, "MODEL_monetico": str(tmp_path / "nowhere")})
    assert done.returncode == 1
    index = (tmp_path / "out" / "index.md").read_text()
    assert f"- monetico page: diffusers-infogain: error: '{tmp_path / 'nowhere'}'" in index or "- monetico page: " in index
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.png") if "runs" in path.parts}
    assert len(made) == (len(FAMILIES) - 1) * (2 * 2 + (0 if NO_FRECHET else 4))
    done = start(tmp_path, environment)
    assert done.returncode == 0, done.stderr
    assert all(path.stat().st_mtime_ns == time for path, time in made.items())
    index = (tmp_path / "out" / "index.md").read_text()
    assert "What failed" not in index
    for family in FAMILIES:
        assert f"## {family}\n" in index
        picture = Image.open(tmp_path / "out" / "pictures" / f"{family}.jpg")
        assert min(picture.size) > 300
        assert (f"### FID of {family}\n" in index) != NO_FRECHET


@pytest.fixture
def coco(capsys, monkeypatch):
    """Runs coco.py in this process and returns its namespace."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["coco.py", *map(str, arguments)])
        return runpy.run_path(str(EXAMPLES / "photographs" / "coco.py"), run_name="__main__")

    return run


def test_a_photograph_has_its_first_caption(coco, tmp_path):
    files = write_coco(tmp_path, 5)
    flags = ["--captions", files["COCO_CAPTIONS"], "--images", files["COCO_IMAGES"]]
    coco(tmp_path / "out", "--count", 4, *flags)
    prompts = read_prompts(tmp_path / "out" / "captions.jsonl")
    assert [prompt.text for prompt in prompts] == [
        "a red cat",
        "a red cat on the mat",
        "a red cat on the mat on the mat",
        "a red cat",
    ]
    for i, prompt in enumerate(prompts):
        assert Image.open(tmp_path / "out" / "images" / prompt.metadata["photograph"]).size == (50 + i, 40)
    with pytest.raises(ValueError, match=r"--count must be at most 5, the number of photographs with captions, got 6\."):
        coco(tmp_path / "more", "--count", 6, *flags)
    with pytest.raises(SystemExit):
        coco(tmp_path / "more", "--captions", files["COCO_CAPTIONS"])


def test_the_data_set_of_the_hub_is_read(coco, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    files = write_coco(tmp_path, 3)
    photographs = sorted(Path(files["COCO_IMAGES"]).iterdir())
    rows = [
        {"image": {"bytes": path.read_bytes(), "path": None}, "caption": f" number {i}\n"} for i, path in enumerate(photographs)
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "train-00000.parquet")
    script = coco(tmp_path / "out", "--count", 1, "--captions", files["COCO_CAPTIONS"], "--images", files["COCO_IMAGES"])
    script["write"](script["from_parquet"](tmp_path / "train-00000.parquet"), tmp_path / "hub", 2)
    lines = [json.loads(line) for line in (tmp_path / "hub" / "captions.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in lines] == ["number 0", "number 1"]
    assert (tmp_path / "hub" / "images" / lines[1]["photograph"]).read_bytes() == photographs[1].read_bytes()
