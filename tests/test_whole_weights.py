"""Weights are all there, or loading fails with one sentence that names file and tensor: in every family and every format."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from helpers.amused import make_components
from helpers.checkpoints import (
    make_lumina_pipeline,
    make_mmada_pipeline,
    make_showo_pipeline,
    write_lumina_repository,
    write_magvit_repository,
    write_mmada_repository,
)
from helpers.checkpoints_maskgit import write_maskgit_checkpoint
from helpers.checkpoints_meissonic import write_meissonic_repository
from helpers.checkpoints_text import write_bert, write_dream, write_llada, write_mdlm_qwen3, write_sdar
from helpers.checkpoints_titok import make_titok_pipeline
from safetensors.torch import load_file, save_file

from diffusers_infogain import CUSTOM_PIPELINE, InfoGainMeissonicPipeline, InfoGainPipeline, load
from diffusers_infogain.checkpoints.saved import load_component

Change = Callable[[dict[str, torch.Tensor], str], dict[str, torch.Tensor]]

CHANGES: dict[str, Change] = {
    "missing": lambda tensors, key: {name: value for name, value in tensors.items() if name != key},
    "renamed": lambda tensors, key: {f"old.{name}" if name == key else name: value for name, value in tensors.items()},
    "reshaped": lambda tensors, key: {**tensors, key: torch.cat([tensors[key], tensors[key]])},
    "integers": lambda tensors, key: {**tensors, key: torch.zeros(tensors[key].shape, dtype=torch.int32)},
    "empty": lambda tensors, key: {},
    "of another model": lambda tensors, key: {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(2)},
}


def write_saved(root: Path) -> Iterator[tuple[str, Path]]:
    """Folders in diffusers' format, of every family."""
    InfoGainPipeline(**make_components()).save_pretrained(root / "amused")
    load(write_meissonic_repository(root / "published-meissonic", True)).save_pretrained(root / "meissonic")
    load(write_maskgit_checkpoint(root / "published-maskgit")).save_pretrained(root / "maskgit")
    make_mmada_pipeline().save_pretrained(root / "mmada")
    make_titok_pipeline().save_pretrained(root / "titok")
    make_showo_pipeline().save_pretrained(root / "showo")
    make_lumina_pipeline().save_pretrained(root / "lumina")
    for name, write in (("llada", write_llada), ("a2d", write_mdlm_qwen3), ("bert", write_bert)):
        load(write(root / f"published-{name}")).save_pretrained(root / name)
    for name in ("amused", "meissonic", "maskgit", "titok", "mmada", "showo", "lumina", "llada", "a2d", "bert"):
        yield name, root / name


def write_published(root: Path) -> Iterator[tuple[str, Path]]:
    """Repositories in their publishers' formats."""
    yield "meissonic", write_meissonic_repository(root / "meissonic", False)
    yield "lumina", write_lumina_repository(root / "lumina")
    yield "mmada", write_mmada_repository(root / "mmada")
    for name, write in (("llada", write_llada), ("dream", write_dream), ("sdar", write_sdar), ("a2d", write_mdlm_qwen3)):
        yield name, write(root / name)
    yield "bert", write_bert(root / "bert")


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> dict[str, Path]:
    return dict(write_saved(tmp_path_factory.mktemp("saved")))


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> dict[str, Path]:
    return dict(write_published(tmp_path_factory.mktemp("published")))


@pytest.fixture(scope="module")
def magvit(tmp_path_factory) -> Path:
    return write_magvit_repository(tmp_path_factory.mktemp("magvit") / "magvitv2")


def kinds_of(names: list[str]) -> list[str]:
    """One tensor of each kind: of those whose names differ in numbers only, the last."""
    return list({"".join(char for char in name if not char.isdigit()): name for name in sorted(names)}.values())


def broken(folder: Path, file: Path, change: str, key: str, target: Path) -> Path:
    """A copy of the folder, in links, with one weight file changed."""
    shutil.copytree(folder, target, copy_function=lambda source, link: Path(link).symlink_to(source))
    copy = target / file.relative_to(folder)
    copy.unlink()
    save_file({name: value.contiguous() for name, value in CHANGES[change](load_file(file), key).items()}, copy, {"format": "pt"})
    return target


def check_refused(folder: Path, file: Path, key: str, change: str, **arguments: object) -> None:
    with pytest.raises(ValueError) as error:
        load(folder, **arguments)
    text = str(error.value)
    assert file.name in text or file.name.replace("model-0", "model") in text, text
    tail = key.split(".")[-1]
    known = {tail, {"beta": "bias", "gamma": "weight"}.get(tail, tail)}  # BERT's old names
    assert change in ("empty", "of another model", "renamed") or any(name in text for name in known), text
    assert "\n" not in text


SAVED = ("amused", "meissonic", "maskgit", "titok", "mmada", "showo", "lumina", "llada", "a2d", "bert")


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("family", SAVED)
def test_saved_folders_with_one_bad_tensor_are_refused(saved, family, change, tmp_path):
    folder = saved[family]
    files = sorted(folder.rglob("*.safetensors"))
    assert files
    for file in files:
        key = kinds_of(list(load_file(file)))[0]
        copy = broken(folder, file, change, key, tmp_path / file.parent.name)
        check_refused(copy, file, key, change)


@pytest.mark.slow
@pytest.mark.parametrize("change", list(CHANGES)[:4])
@pytest.mark.parametrize("family", SAVED)
def test_every_kind_of_tensor_is_needed(saved, family, change, tmp_path):
    pipe = load(saved[family])
    for file in sorted(saved[family].rglob("*.safetensors")):
        kind = type(getattr(pipe, file.parent.name))
        for i, key in enumerate(kinds_of(list(load_file(file)))):
            if key in ("quantize.embedding", "quantize.power_vals") and change != "reshaped":
                continue  # MAGVIT-v2 computes them, and one holds integers
            copy = broken(saved[family], file, change, key, tmp_path / f"{file.parent.name}{i}")
            with pytest.raises(ValueError, match=key.split(".")[-1]):
                load_component(kind, copy / file.parent.name)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("family", ["meissonic", "lumina", "mmada", "llada", "dream", "sdar", "a2d", "bert"])
def test_published_repositories_with_one_bad_tensor_are_refused(published, magvit, family, change, tmp_path):
    folder, arguments = published[family], {"vqvae": magvit} if family == "mmada" else {}
    files = sorted(folder.rglob("*.safetensors"))
    assert files
    for file in files:
        key = kinds_of(list(load_file(file)))[0]
        copy = broken(folder, file, change, key, tmp_path / f"{file.parent.name}-{file.stem}")
        check_refused(copy, Path("model"), key, change, **arguments)


@pytest.mark.parametrize("change", ["missing", "reshaped"])
def test_pickles_with_one_bad_tensor_are_refused(change, tmp_path):
    file = write_maskgit_checkpoint(tmp_path / "maskgit")
    content = torch.load(file, weights_only=True)
    key = next(name for name in content["model_state_dict"] if name.endswith("ln2.weight"))
    torch.save({"model_state_dict": CHANGES[change](content["model_state_dict"], key)}, file)
    with pytest.raises(ValueError, match=r"ImageNet_256_tiny.pth.*ln2.weight"):
        load(file)


# Layouts


@pytest.mark.parametrize("layout", ["shards", "fp16", "fp16 shards"])
def test_shards_and_variants_are_checked_like_whole_files(layout, tmp_path):
    pipe = InfoGainPipeline(**make_components())
    options = {"max_shard_size": "4KB"} if "shards" in layout else {}
    arguments = {"variant": "fp16"} if "fp16" in layout else {}
    pipe.save_pretrained(tmp_path / "whole", **options, **arguments)
    assert type(load(tmp_path / "whole", **arguments)) is InfoGainPipeline
    for name in ("transformer", "vqvae", "text_encoder"):
        file = sorted((tmp_path / "whole" / name).glob("*.safetensors"))[-1]
        assert ("-of-" in file.name) == ("shards" in layout)
        key = sorted(load_file(file))[-1]
        copy = broken(tmp_path / "whole", file, "missing", key, tmp_path / name)
        with pytest.raises(ValueError, match=rf"1 tensors of the \w+ are missing: {key}"):
            load(copy, **arguments)


def test_pickles_in_saved_folders_are_checked_too(tmp_path):
    InfoGainPipeline(**make_components()).save_pretrained(tmp_path / "model", safe_serialization=False)
    file = next((tmp_path / "model" / "vqvae").glob("*.bin"))
    for one in (tmp_path / "model" / "text_encoder").glob("*.safetensors"):  # transformers writes no pickles any more
        torch.save(load_file(one), one.parent / "pytorch_model.bin")
    assert type(load(tmp_path / "model", use_safetensors=False)) is InfoGainPipeline
    tensors = torch.load(file, weights_only=True)
    del tensors["quantize.embedding.weight"]
    torch.save(tensors, file)
    with pytest.raises(ValueError, match=r"diffusion_pytorch_model.bin: 1 tensors of the VQModel are missing: quantize.embed"):
        load(tmp_path / "model", use_safetensors=False)


@pytest.mark.parametrize(("family", "one"), [("a2d", "lm_head.weight"), ("bert", "cls.predictions.decoder.weight")])
def test_of_tied_names_any_one_in_the_file_is_enough(saved, published, family, one, tmp_path):
    """The one that transformers does not write."""
    other = {"a2d": "model.embed_tokens.weight", "bert": "bert.embeddings.word_embeddings.weight"}[family]
    for folder in (saved[family], published[family]):
        copy = shutil.copytree(folder, tmp_path / folder.parent.name)
        for file in copy.rglob("*.safetensors"):
            tensors = load_file(file)
            if other in tensors:
                tensors[one] = tensors.pop(other)
                save_file(tensors, file, {"format": "pt"})
        for index in copy.rglob("*.index.json"):
            index.write_text(index.read_text().replace(other, one))
        expected, model = load(folder).model, load(copy).model
        assert torch.equal(model.get_parameter(one), expected.get_parameter(other))
        assert model.get_parameter(one) is model.get_parameter(other)


def test_tied_names_that_differ_are_refused(published, tmp_path):
    copy = shutil.copytree(published["a2d"], tmp_path / "model")
    file = next(one for one in copy.glob("*.safetensors") if "model.embed_tokens.weight" in load_file(one))
    tensors = load_file(file)
    save_file({**tensors, "lm_head.weight": 2 * tensors["model.embed_tokens.weight"]}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"lm_head.weight and model.embed_tokens.weight are one tensor of a .*, but differ"):
        load(copy)


def test_a_missing_weight_is_found_with_the_custom_pipeline_too(saved, tmp_path):
    file = saved["amused"] / "text_encoder" / "model.safetensors"
    key = "text_model.embeddings.token_embedding.weight"
    options = {"custom_pipeline": CUSTOM_PIPELINE, "trust_remote_code": True}
    assert isinstance(DiffusionPipeline.from_pretrained(saved["amused"], **options), InfoGainPipeline)
    with pytest.raises(ValueError, match=rf"model.safetensors: 1 tensors of the CLIPTextModelWithProjection are missing: {key}"):
        DiffusionPipeline.from_pretrained(broken(saved["amused"], file, "missing", key, tmp_path / "model"), **options)


# The right class


@pytest.mark.parametrize("family", SAVED[1:])
def test_a_folder_of_another_family_is_refused(saved, family):
    with pytest.raises(ValueError, match=r"must name the pipeline InfoGainPipeline, got .*: `diffusers_infogain.load` finds"):
        InfoGainPipeline.from_pretrained(saved[family])
    with pytest.raises(ValueError, match=r"`diffusers_infogain.load` finds"):
        DiffusionPipeline.from_pretrained(saved[family], custom_pipeline=CUSTOM_PIPELINE, trust_remote_code=True)
    other = InfoGainMeissonicPipeline if family != "meissonic" else type(load(saved["mmada"]))
    with pytest.raises(ValueError, match=r"`diffusers_infogain.load` finds"):
        other.from_pretrained(saved[family])
    assert type(load(saved[family])) is not InfoGainPipeline


@pytest.mark.parametrize(
    ("entry", "text"),
    [
        (["os", "system"], r"`vqvae` must be a model, tokenizer or scheduler of diffusers.*got \['os', 'system'\]"),
        (["diffusers", "AutoencoderKL"], "`vqvae` must be a VQModel, got AutoencoderKL"),
        (["diffusers", "StableDiffusionPipeline"], "`vqvae` must be a model, tokenizer or scheduler"),
        (["transformers", "CLIPTokenizer"], "`vqvae` must be a VQModel, got CLIPTokenizer"),
        (["transformers", 5], "`vqvae` must be a model, tokenizer or scheduler"),
        (["diffusers_infogain.cli.__main__", "main"], "`vqvae` must be a model, tokenizer or scheduler"),
        (["VQModel"], "`vqvae` must be a list of a library and a class, got"),
        ("VQModel", "`vqvae` must be a list of a library and a class, got"),
        ({}, "`vqvae` must be a list of a library and a class, got"),
        (5, "`vqvae` must be a list of a library and a class, got"),
    ],
)
def test_an_index_of_other_components_is_refused(saved, entry, text, tmp_path):
    folder = shutil.copytree(saved["amused"], tmp_path / "model")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "vqvae": entry}))
    with pytest.raises(ValueError, match=text) as error:
        load(folder)
    assert "model_index.json" in str(error.value)


# Arguments


@pytest.mark.parametrize("family", SAVED)
def test_a_typo_is_a_type_error_in_saved_folders(saved, family):
    with pytest.raises(TypeError, match="unexpected keyword argument 'dtpye'"):
        load(saved[family], dtpye=torch.float16)


@pytest.mark.parametrize("family", ["meissonic", "llada"])
def test_a_typo_is_a_type_error_in_published_repositories(published, family):
    for name in ("dtpye", "low_cpu_mem_usage", "without"):
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
            load(published[family], **{name: "auto"})


@pytest.mark.parametrize("family", ["amused", "llada"])
def test_code_of_a_repository_is_never_trusted(saved, published, family):
    folders = (saved[family], published["llada"])
    for folder in folders:
        assert load(folder, trust_remote_code=False)
        with pytest.raises(ValueError, match="`trust_remote_code` must be False"):
            load(folder, trust_remote_code=True)


def models_of(pipe: DiffusionPipeline) -> dict[str, torch.nn.Module]:
    return {name: model for name, model in pipe.components.items() if isinstance(model, torch.nn.Module)}


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16", torch.bfloat16, "auto", None])
@pytest.mark.parametrize("family", ["amused", "meissonic", "mmada", "llada", "bert"])
def test_a_dtype_is_a_name_a_dtype_or_as_stored(saved, published, magvit, family, dtype):
    expected = getattr(torch, dtype) if dtype not in ("auto", None, torch.bfloat16) else dtype
    for folder in (saved[family], published.get(family)):
        if folder is None:
            continue
        arguments = {"vqvae": magvit} if family == "mmada" and folder == published[family] else {}
        pipe = load(folder, dtype=dtype, **arguments)
        for name, model in models_of(pipe).items():
            wanted = torch.float32 if dtype in ("auto", None) or (family, name) == ("mmada", "vqvae") else expected
            assert {value.dtype for value in model.parameters()} == {wanted}, name


@pytest.mark.parametrize("dtype", ["auto", None])
def test_as_stored_is_what_the_files_say(tmp_path, dtype):
    load("demo").to(torch.bfloat16).save_pretrained(tmp_path / "image")
    load(write_llada(tmp_path / "llada")).to(torch.float16).save_pretrained(tmp_path / "text")
    assert {model.dtype for model in models_of(load(tmp_path / "image", dtype=dtype)).values()} == {torch.bfloat16}
    assert load(tmp_path / "text", dtype=dtype).model.dtype == torch.float16


@pytest.mark.parametrize("dtype", ["float", "bf16", "int8", torch.int8, torch.float8_e4m3fn, 16, "", ["float16"], {"vqvae": "x"}])
def test_other_dtypes_are_refused_with_the_allowed_ones(saved, published, dtype):
    for folder in (saved["amused"], published["llada"]):
        with pytest.raises(ValueError, match=r"`dtype` must be one of auto, float64, float32, bfloat16, float16, a torch.dtype"):
            load(folder, dtype=dtype)
    with pytest.raises(TypeError, match="both `dtype` and `torch_dtype`"):
        load(saved["amused"], dtype="float32", torch_dtype="float32")


def test_dtypes_by_component(saved, published):
    for folder in (saved["meissonic"], published["meissonic"]):
        pipe = load(folder, dtype={"transformer": "bfloat16", "default": torch.float16, "vqvae": "auto"})
        expected = {"transformer": torch.bfloat16, "text_encoder": torch.float16, "vqvae": torch.float32}
        assert {name: model.dtype for name, model in models_of(pipe).items()} == expected


def mixed(folder: Path) -> None:
    """Norms in float32, the rest in bfloat16."""
    for file in folder.rglob("*.safetensors"):
        tensors = {name: value if "norm" in name else value.to(torch.bfloat16) for name, value in load_file(file).items()}
        save_file(tensors, file, {"format": "pt"})


@pytest.mark.parametrize("family", ["llada", "dream", "sdar", "a2d"])
def test_checkpoints_of_several_dtypes_compute_in_the_one_of_most_numbers(published, family, tmp_path, capsys):
    from diffusers_infogain.cli import main

    folder = shutil.copytree(published[family], tmp_path / "mixed")
    mixed(folder)
    assert main(["convert", str(folder), str(tmp_path / "out")]) == 0, capsys.readouterr().err
    for one in (folder, tmp_path / "out"):
        for dtype in (None, "auto", "float32"):
            pipe = load(one, dtype=dtype)
            pipe.set_progress_bar_config(disable=True)
            assert {value.dtype for value in pipe.model.parameters()} == {torch.float32 if dtype == "float32" else torch.bfloat16}
            assert pipe("a red cat", max_new_tokens=4).sequences.shape[0] == 1


@pytest.mark.parametrize("family", ["amused", "meissonic", "lumina"])
def test_saved_folders_of_several_dtypes_compute(saved, family, tmp_path):
    folder = shutil.copytree(saved[family], tmp_path / "mixed")
    mixed(folder)
    pipe = load(folder)
    for model in models_of(pipe).values():
        assert len({value.dtype for value in model.parameters()}) == 1
    pipe.set_progress_bar_config(disable=True)
    assert pipe("a red cat", num_inference_steps=2, output_type="np").images.std() > 0


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_another_default_dtype_changes_nothing(saved, published, default):
    folders = (saved["amused"], saved["mmada"], saved["llada"], published["meissonic"], published["bert"])
    expected = [{name: model.state_dict() for name, model in models_of(load(folder)).items()} for folder in folders]
    torch.set_default_dtype(default)
    try:
        found = [{name: model.state_dict() for name, model in models_of(load(folder)).items()} for folder in folders]
    finally:
        torch.set_default_dtype(torch.float32)
    for one, two in zip(expected, found, strict=True):
        for name in one:
            for key, value in one[name].items():
                assert two[name][key].dtype == value.dtype
                assert torch.equal(two[name][key], value)


def test_components_that_are_given_are_taken_in_every_format(saved, published, magvit):
    for folder in (saved["meissonic"], published["meissonic"]):
        pipe = load(folder)
        again = load(folder, vqvae=pipe.vqvae, scheduler=pipe.scheduler, tokenizer=pipe.tokenizer)
        assert again.vqvae is pipe.vqvae
        assert again.scheduler is pipe.scheduler
        assert again.tokenizer is pipe.tokenizer
        assert again.transformer is not pipe.transformer
    vqvae = load(published["mmada"], vqvae=magvit).vqvae
    assert load(published["mmada"], vqvae=vqvae).vqvae is vqvae
