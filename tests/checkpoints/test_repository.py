"""Which pipeline a repository is for: every family recognises its own, by files that are read once."""

from __future__ import annotations

import functools
import importlib
from pathlib import Path

import pytest
from helpers.checkpoints import write_lumina_repository, write_mmada_repository, write_showo_repository
from helpers.checkpoints_maskgit import write_maskgit_checkpoint
from helpers.checkpoints_meissonic import write_meissonic_repository
from helpers.checkpoints_text import write_bert, write_llada
from helpers.checkpoints_titok import write_titok_repositories

from diffusers_infogain import InfoGainPipeline, InfoGainTextPipeline, load
from diffusers_infogain.checkpoints import repository
from diffusers_infogain.checkpoints.repository import HubArguments, Repository
from diffusers_infogain.checkpoints.saved import component_class
from diffusers_infogain.loading import PIPELINES, pipeline_class

WRITERS = {
    "MaskGIT": write_maskgit_checkpoint,
    "TiTok": lambda folder: write_titok_repositories(folder)[0],
    "MMaDA": write_mmada_repository,
    "Showo": write_showo_repository,
    "Meissonic": lambda folder: write_meissonic_repository(folder, False),
    "Lumina": write_lumina_repository,
    "Text": write_llada,
}


def recognised(folder: Path | str) -> list[str]:
    return [
        cls.__name__.removeprefix("InfoGain").removesuffix("Pipeline") for cls in PIPELINES if cls.recognises(Repository(folder))
    ]


@pytest.mark.parametrize("family", WRITERS)
def test_a_published_repository_is_recognised_by_its_own_pipeline(family, tmp_path):
    published = WRITERS[family](tmp_path / "published")
    assert recognised(published) == ([family, "Text"] if family == "MMaDA" else [family])
    assert pipeline_class(published) is next(cls for cls in PIPELINES if family in cls.__name__)


@pytest.mark.parametrize("family", ["MaskGIT", "Meissonic", "Lumina", "Text"])
def test_a_saved_folder_is_recognised_by_its_own_pipeline(family, tmp_path):
    load(WRITERS[family](tmp_path / "published")).save_pretrained(tmp_path / "saved")
    assert recognised(tmp_path / "saved") == [family]


@pytest.mark.parametrize("name", ["x" * 100_000, "b/" * 3000, "b/" * 1500], ids=["name", "path", "Hub id"])
def test_a_very_long_name_is_refused_in_a_short_sentence(name, tmp_path):
    maskgit = write_maskgit_checkpoint(tmp_path / "published")
    calls = [functools.partial(call, name) for cls in PIPELINES for call in (cls.from_pretrained, cls.open_published)]
    for call in (*calls, lambda: load(name), lambda: load(maskgit, vqvae=name)):
        with pytest.raises(OSError) as error:
            call()
        reason = "neither a folder nor a Hub repository" if name == "b/" * 1500 else "File name too long"
        assert reason in str(error.value)
        assert len(str(error.value)) < 1000


def test_an_empty_name_is_not_the_current_folder(tmp_path, monkeypatch):
    write_llada(tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    for call in (load, InfoGainTextPipeline.from_pretrained, InfoGainTextPipeline.open_published):
        with pytest.raises(OSError, match="must not be empty, got ''"):
            call("")
        assert call(".")


def test_embedded_models_are_recognised_by_name():
    assert (pipeline_class("demo"), pipeline_class("demo-text")) == (InfoGainPipeline, InfoGainTextPipeline)


@pytest.mark.parametrize("name", ["AmusedPipeline", "AmusedImg2ImgPipeline", "AmusedInpaintPipeline", "InfoGainPipeline"])
def test_amused_has_several_names(name, tmp_path):
    (tmp_path / "model_index.json").write_text(f'{{"_class_name": "{name}"}}')
    assert pipeline_class(tmp_path) is InfoGainPipeline


def test_files_are_read_once_and_a_config_counts_only_without_a_model_index(tmp_path, monkeypatch):
    read = []
    read_json = repository.read_json
    monkeypatch.setattr(repository, "read_json", lambda path: (read.append(path.name), read_json(path))[1])
    (tmp_path / "config.json").write_text('{"model_type": "mmada"}')
    opened = Repository(tmp_path)
    assert [cls.recognises(opened) for cls in PIPELINES].count(True) == 2
    assert read == ["config.json"]
    (tmp_path / "model_index.json").write_text('{"_class_name": "Other"}')
    opened = Repository(tmp_path)
    assert not any(cls.recognises(opened) for cls in PIPELINES)
    assert read == ["config.json", "model_index.json"]


def test_a_class_name_is_a_string(tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": 3}')
    with pytest.raises(ValueError, match=r"model_index.json: `_class_name` must be a string, got 3"):
        pipeline_class(tmp_path)


def test_a_family_in_diffusers_format_has_nothing_to_open(tmp_path):
    with pytest.raises(OSError, match=r"has no model_index.json"):
        InfoGainPipeline.open_published(tmp_path)
    (tmp_path / "model_index.json").write_text('{"_class_name": "AmusedPipeline"}')
    with pytest.raises(ValueError, match=r"is in diffusers' format: load it with `InfoGainPipeline.from_pretrained`"):
        InfoGainPipeline.open_published(tmp_path)


def test_arguments_of_the_hub_are_picked_from_those_of_a_call():
    given = HubArguments.given({"revision": "main", "dtype": None, "token": False})
    assert given == {"revision": "main", "token": False}
    assert HubArguments(**given).local_files_only is False


def test_a_text_encoder_is_no_text_model_of_its_own(tmp_path):
    assert recognised(write_bert(tmp_path / "bert")) == ["Text"]
    (tmp_path / "config.json").write_text('{"model_type": "clip_text_model"}')
    with pytest.raises(ValueError, match=r"Cannot tell the model family of .* 'clip_text_model': supported are MaskGIT"):
        pipeline_class(tmp_path)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("scheduling_infogain", "InfoGainScheduler"),
        ("models.llada", "BidirectionalLlama"),
        ("models.magvit_v2", "MagvitV2Model"),
        ("models.maskgit_transformer", "MaskGITTransformer2DModel"),
        ("models.meissonic_transformer", "MeissonicTransformer2DModel"),
    ],
)
def test_saved_pipelines_name_modules_that_stay_where_they_are(module, name):
    library = f"diffusers_infogain.{module}"
    cls = component_class(library, name, "model_index.json")
    assert cls is getattr(importlib.import_module(library), name)
    assert (cls.__module__, cls.__name__) == (library, name)


@pytest.mark.parametrize(
    ("library", "name"),
    [
        ("diffusers_infogain.models.llada", "LlamaForCausalLM"),  # imported there, not defined there
        ("diffusers_infogain.models.llada", "open_llada"),
        ("diffusers_infogain.models.nothing", "Model"),
        ("diffusers_infogain.checkpoints.saved", "ModelMixin"),
        ("diffusers_infogain.models.llada.os", "system"),
        ("diffusers_infogain.models", "llada"),
    ],
)
def test_nothing_but_own_models_is_taken_from_this_package(library, name):
    with pytest.raises(ValueError, match=r"model_index.json must be a model, tokenizer or scheduler of diffusers"):
        component_class(library, name, "model_index.json")
