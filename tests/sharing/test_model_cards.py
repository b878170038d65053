"""Model cards: what they say, that their code runs, and when they are written; and what the Hub gets and gives."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import PIL.Image
import pytest
import torch
from helpers.amused import make_components
from helpers.checkpoints import make_mmada_pipeline, make_showo_pipeline
from helpers.checkpoints_maskgit import write_maskgit_checkpoint
from helpers.checkpoints_meissonic import write_meissonic_repository
from helpers.checkpoints_text import write_llada
from helpers.checkpoints_titok import make_maskgen_pipeline, make_titok_pipeline
from helpers.hub import local_hub
from huggingface_hub import ModelCard
from huggingface_hub.errors import RepositoryNotFoundError

from diffusers_infogain import PRESETS, InfoGainMaskGITPipeline, InfoGainPipeline, InfoGainScheduler, export_pipeline, load
from diffusers_infogain.checkpoints.convert import convert
from diffusers_infogain.checkpoints.saved import OWN_CLASSES
from diffusers_infogain.model_cards import licence_of, model_card

PIPES = {
    "demo": lambda folder: load("demo"),
    "maskgit": lambda folder: load(write_maskgit_checkpoint(folder)),
    "maskgen": lambda folder: make_maskgen_pipeline(),
    "titok": lambda folder: make_titok_pipeline(),
    "mmada": lambda folder: make_mmada_pipeline(),
    "showo": lambda folder: make_showo_pipeline(),
    "demo-text": lambda folder: load("demo-text"),
}


@pytest.fixture(params=PIPES)
def family(request) -> str:
    return request.param


def code_of(card: str) -> str:
    (block,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    return block


def test_the_code_of_a_card_runs_beside_the_folder(family, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pipe = PIPES[family](tmp_path / "published")
    pipe.save_pretrained("my model")
    code = code_of((tmp_path / "my model" / "README.md").read_text())
    assert len([line for line in code.splitlines() if line]) <= 5
    names: dict[str, Any] = {}
    exec(code, names)
    assert type(names["pipe"]) is type(pipe)
    if family != "demo-text":
        with PIL.Image.open("image.png") as image:
            assert image.size == names["image"].size


@pytest.mark.slow
def test_the_code_of_an_exported_card_runs_in_another_process(tmp_path):
    export_pipeline(load("demo"), tmp_path / "my model")
    code = code_of((tmp_path / "my model" / "README.md").read_text())
    assert "diffusers_infogain" not in code
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True, capture_output=True)
    with PIL.Image.open(tmp_path / "image.png") as image:
        assert image.size == (64, 64)


def test_a_card_says_what_the_pipeline_is(tmp_path):
    pipe = load(write_maskgit_checkpoint(tmp_path))
    pipe.scheduler = InfoGainScheduler.from_config(pipe.scheduler.config, **PRESETS["maskgit_halton"])
    pipe.register_to_config(_name_or_path="llvictorll/Halton-MaskGIT")
    card = model_card(pipe, "me/model", license="mit")
    assert card.data.library_name == "diffusers"
    assert card.data.base_model == "llvictorll/Halton-MaskGIT"
    assert card.data.license == "mit"
    assert card.data.pipeline_tag is None  # the Hub has none for classes
    text = str(card)
    assert text.startswith("---\n")
    assert "# model\n" in text
    assert 'load("me/model")' in text
    assert "`halton`: a low-discrepancy order over the image grid" in text
    assert "| `masking_schedule` | `'arccos'` |" in text
    assert "num_inference_steps=32` and `guidance_scale=0.5`" in text
    assert "| `transformer` | `MaskGITTransformer2DModel` | " in text
    assert "The weights are under mit." in text


@pytest.mark.parametrize(("name", "tag"), [("demo", "text-to-image"), ("demo-text", "text-generation")])
def test_tags_are_those_of_the_hub(name, tag):
    data = model_card(load(name), "model").data
    assert data.pipeline_tag == tag
    assert {"masked-diffusion", "info-gain"} <= set(data.tags)
    assert data.base_model is None  # no Hub id


def test_weights_in_half_precision_are_loaded_so():
    assert "dtype=torch.bfloat16" in code_of(str(model_card(load("demo").to(torch.bfloat16), "model", needs_package=False)))


@pytest.mark.parametrize("argument", ["license", "base_model"])
def test_arguments_of_a_card_are_checked(argument):
    with pytest.raises(ValueError, match=f"`{argument}` must be .* or None, got"):
        model_card(load("demo"), "model", **{argument: 3})


def test_a_card_that_is_there_stays(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "README.md").write_text("mine")
    InfoGainPipeline(**make_components()).save_pretrained(tmp_path / "model")
    assert (tmp_path / "model" / "README.md").read_text() == "mine"


def test_convert_writes_a_card(tmp_path):
    convert(InfoGainMaskGITPipeline, write_maskgit_checkpoint(tmp_path / "published"), tmp_path / "converted")
    card = ModelCard.load(tmp_path / "converted" / "README.md")
    assert 'load("converted")' in str(card)
    assert card.data.base_model is None  # a file of this machine


def test_the_licence_is_that_of_the_models_own_card(tmp_path):
    assert licence_of("demo") == "apache-2.0"
    assert licence_of(tmp_path) is None
    (tmp_path / "README.md").write_text("---\nlicense: [\n---\n")
    assert licence_of(tmp_path) is None
    assert licence_of("nobody/nothing") is None  # no network


class Hub:
    """Stands in for the functions that write to the Hub, and keeps what they got."""

    def __init__(self, monkeypatch, card: str | None = None):
        self.uploads: list[dict[str, Any]] = []
        self.files: dict[str, str] = {}
        self.card = card
        for name, function in (("create_repo", self.create), ("upload_folder", self.upload)):
            monkeypatch.setattr(f"diffusers_infogain.model_cards.{name}", function)
        monkeypatch.setattr("diffusers_infogain.model_cards.ModelCard.load", self.load)

    def create(self, repo_id: str, **options: Any) -> Any:
        self.options = options
        return mock.Mock(repo_id=f"me/{repo_id.rpartition('/')[2]}")

    def upload(self, folder_path: Path, **options: Any) -> str:
        self.uploads.append(options)
        self.files = {path.name: path.read_text() for path in Path(folder_path).rglob("*.*") if path.suffix in (".md", ".json")}
        return "commit"

    def load(self, repo_id: str, **options: Any) -> ModelCard:
        if self.card is None:
            raise RepositoryNotFoundError("404", response=mock.Mock(headers={}))
        return ModelCard(self.card)


def test_what_is_pushed_has_a_card(monkeypatch):
    hub = Hub(monkeypatch)
    assert load("demo").push_to_hub("model", private=True, token="secret") == "commit"
    assert hub.options == {"private": True, "token": "secret", "exist_ok": True}
    (upload,) = hub.uploads
    assert upload["repo_id"] == "me/model"
    assert upload["commit_message"] == "Upload InfoGainPipeline"
    assert 'load("me/model")' in hub.files["README.md"]
    assert "secret" not in "".join(hub.files.values())


def test_a_card_on_the_hub_stays(monkeypatch, tmp_path):
    hub = Hub(monkeypatch, "---\nlicense: mit\n---\nmine")
    load("demo").push_to_hub("model")
    assert "mine" in hub.files["README.md"]
    load("demo").save_pretrained(tmp_path / "folder", push_to_hub=True, commit_message="Better")
    assert "mine" in hub.files["README.md"]
    assert [upload["repo_id"] for upload in hub.uploads] == ["me/model", "me/folder"]
    assert hub.uploads[1]["commit_message"] == "Better"


def test_a_subfolder_of_the_hub_gets_no_card(monkeypatch):
    hub = Hub(monkeypatch)
    load("demo").push_to_hub("model", subfolder="part")
    assert hub.uploads[0]["path_in_repo"] == "part"
    assert "README.md" not in hub.files


def test_saved_pipelines_name_their_own_classes_so_that_the_hub_can_load_them(tmp_path):
    for pipe in (load(write_maskgit_checkpoint(tmp_path / "a")), load(write_meissonic_repository(tmp_path / "b", True))):
        index = pipe.saved_index()
        libraries = {name: entry for name, entry in index.items() if isinstance(entry, list)}
        assert {entry[0] for entry in libraries.values()} <= {"diffusers", "transformers"}
        assert libraries["scheduler"] == ["diffusers", "InfoGainScheduler"]
        assert libraries["transformer"][1] in OWN_CLASSES
    assert load(write_llada(tmp_path / "c")).saved_index()["model"] == ["diffusers", "BidirectionalLlama"]


@pytest.mark.slow
def test_the_hub_gives_exports_to_diffusers_and_saved_pipelines_to_the_package(tmp_path):
    pipe = load(write_maskgit_checkpoint(tmp_path / "published"))
    export_pipeline(pipe, tmp_path / "hub" / "me" / "export")
    pipe.save_pretrained(tmp_path / "hub" / "me" / "saved")
    program = """
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained("me/export", custom_pipeline="me/export", trust_remote_code=True)
print(pipe("golden retriever", num_inference_steps=2, output_type="latent").images.shape)
import diffusers_infogain
print(type(diffusers_infogain.load("me/export")).__module__, type(diffusers_infogain.load("me/saved")).__module__)
"""
    with local_hub(tmp_path / "hub") as (address, requests):
        environment = os.environ | {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
        environment |= {"HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}
        command = [sys.executable, "-c", program]
        run = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8", timeout=300)
    assert run.returncode == 0, run.stderr
    assert "not found in your environment" not in run.stderr
    own = "diffusers_infogain.pipeline_infogain_maskgit"
    assert run.stdout.splitlines() == ["torch.Size([1, 4, 4])", f"{own} {own}"]
    modules = len(list((tmp_path / "hub" / "me" / "export").glob("*.py")))
    asked = [request for request in requests if re.search(r"/me/export/resolve/\S+\.py", request)]
    assert modules <= len(set(asked))
    assert len(asked) < 6 * modules  # not once for every path of imports
