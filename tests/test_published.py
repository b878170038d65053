"""Published repositories: loaded as they are, converted, loaded again; refused in one sentence where they do not fit."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from helpers.checkpoints import write_magvit_repository, write_mmada_repository, write_phi_repository, write_showo_repository
from helpers.checkpoints_maskgit import write_maskgit_checkpoint
from helpers.checkpoints_text import write_bert, write_dream, write_llada, write_sdar
from helpers.sampling import generators
from PIL import Image
from safetensors.torch import load_file, save_file

from diffusers_infogain import InfoGainMaskGITPipeline, InfoGainMMaDAPipeline, InfoGainPipeline, InfoGainTextPipeline, load
from diffusers_infogain.checkpoints import source
from diffusers_infogain.cli import main
from diffusers_infogain.loading import image_pipeline_class
from diffusers_infogain.models import llada


@pytest.fixture(scope="module")
def mmada(tmp_path_factory) -> Path:
    return write_mmada_repository(tmp_path_factory.mktemp("published") / "MMaDA-8B-MixCoT")


@pytest.fixture(scope="module")
def magvit(tmp_path_factory) -> Path:
    return write_magvit_repository(tmp_path_factory.mktemp("published") / "magvitv2")


def tokens_of(pipe, prompt="a red cat") -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    return pipe(prompt, generator=generators(0), num_inference_steps=2, height=32, width=32, output_type="latent").images


# MMaDA


@pytest.fixture(scope="module")
def converted(mmada, magvit, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("converted") / "mmada"
    assert main(["convert", str(mmada), str(target), "--vqvae", str(magvit), "--max-shard-size", "0.005"]) == 0
    return target


def test_mmada_as_published_and_as_converted_and_as_saved_again(mmada, magvit, converted, tmp_path):
    pipe = load(mmada, vqvae=magvit)
    assert type(pipe) is InfoGainMMaDAPipeline
    assert pipe.config.image_token_offset == 126349
    assert pipe.scheduler.config.mask_token_id == 8192
    expected = tokens_of(pipe)
    again = InfoGainMMaDAPipeline.from_pretrained(converted)
    assert torch.equal(tokens_of(again), expected)
    again.save_pretrained(tmp_path / "saved")
    assert torch.equal(tokens_of(load(tmp_path / "saved")), expected)


def test_a_converted_folder_is_safetensors_in_shards_without_code(converted):
    files = {str(path.relative_to(converted)) for path in converted.rglob("*") if path.is_file()}
    assert {"model_index.json", "transformer/config.json", "transformer/model.safetensors.index.json"} <= files
    assert {"scheduler/scheduler_config.json", "tokenizer/tokenizer.json", "vqvae/config.json"} <= files
    assert "transformer/model-00001-of-00003.safetensors" in files
    assert all(Path(file).suffix in (".json", ".safetensors", ".jinja") for file in files - {"README.md"})
    assert not list(converted.parent.glob(".*"))


def test_the_summary_says_what_was_written(mmada, magvit, tmp_path, capsys):
    assert main(["convert", str(mmada), str(tmp_path / "out"), "--vqvae", str(magvit), "--dtype", "bfloat16"]) == 0
    out = capsys.readouterr().out
    assert "transformer: 21 tensors, 4.3 M parameters, 0.01 GB" in out
    assert "InfoGainMMaDAPipeline.from_pretrained" in out
    pipe = load(tmp_path / "out", dtype=torch.bfloat16)
    assert pipe.transformer.dtype == torch.bfloat16
    assert pipe.vqvae.dtype == torch.float32  # signs of numbers near 0 are its codes


def test_generate_and_compare_take_a_published_mmada(mmada, magvit, tmp_path, capsys):
    flags = ["--model", str(mmada), "--vqvae", str(magvit), "--height", "32", "--width", "32"]
    shot = ["--steps", "2", "--batch-size", "1"]
    assert main(["generate", "a red cat", *flags, *shot, "--output", str(tmp_path / "images")]) == 0
    assert len(list((tmp_path / "images").glob("*.png"))) == 1
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red cat\ntwo dogs\n")
    evaluate = ["evaluate", "--prompts", str(prompts), *flags, *shot, "--output", str(tmp_path / "run")]
    assert main(evaluate) == 0, capsys.readouterr().err
    assert json.loads((tmp_path / "run" / "report.json").read_text())["settings"]["guidance_scale"] == 3.5


# Show-o


def test_show_o_on_the_command_line(magvit, tmp_path, capsys):
    showo, phi = write_showo_repository(tmp_path / "show-o", pickled=True), write_phi_repository(tmp_path / "phi-1_5")
    flags = ["--model", str(showo), "--vqvae", str(magvit), "--language-model", str(phi), "--steps", "2", "--batch-size", "1"]
    assert main(["generate", "a red cat", *flags, "--preset", "showo", "--output", str(tmp_path / "images")]) == 0
    record = json.loads(Image.open(next((tmp_path / "images").glob("*.png"))).text["infogain"])
    assert (record["guidance_scale"], record["scheduler"]["annealing"]) == (1.75, "product")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red cat\ntwo dogs\n")
    compare = ["compare", "--prompts", str(prompts), "--samplers", "showo", "halton", "--seeds", "0", *flags]
    assert main([*compare, "--output", str(tmp_path / "run")]) == 0, capsys.readouterr().err
    convert = ["convert", *flags[1:2], str(tmp_path / "converted"), *flags[2:6]]
    assert main(convert) == 0, capsys.readouterr().err
    assert "InfoGainShowoPipeline.from_pretrained" in capsys.readouterr().out
    assert main(["generate", "fog", "--model", "demo", *flags[4:6], "--output", str(tmp_path / "none")]) == 2
    assert "--language-model does not apply to InfoGainPipeline" in capsys.readouterr().err


# MaskGIT


@pytest.fixture(scope="module")
def maskgit(tmp_path_factory) -> Path:
    return write_maskgit_checkpoint(tmp_path_factory.mktemp("published"))


def test_maskgit_as_published_and_as_converted_and_as_saved_again(maskgit, tmp_path, capsys):
    def tokens_of(pipe):
        pipe.set_progress_bar_config(disable=True)
        return pipe("goldfish", generator=generators(0), num_inference_steps=2, output_type="latent").images

    pipe = load(maskgit)
    assert type(pipe) is InfoGainMaskGITPipeline
    expected = tokens_of(pipe)
    assert main(["convert", str(maskgit), str(tmp_path / "out")]) == 0
    assert "transformer: 20 tensors, 2.3 M parameters" in capsys.readouterr().out
    again = load(tmp_path / "out")
    assert torch.equal(tokens_of(again), expected)
    again.save_pretrained(tmp_path / "saved")
    assert torch.equal(tokens_of(load(tmp_path / "saved")), expected)


def test_generate_and_compare_take_classes(maskgit, tmp_path, capsys):
    names = tmp_path / "classes.txt"
    names.write_text("goldfish\n207\n")
    flags = ["--model", str(maskgit), "--batch-size", "2", "--device", "cpu"]
    output = ["--output", str(tmp_path / "images")]
    assert main(["generate", "--prompts-file", str(names), *flags, "--steps", "2", *output]) == 0, capsys.readouterr().err
    assert len(list((tmp_path / "images").glob("*.png"))) == 2
    arguments = ["--prompts", str(names), "--samplers", "maskgit", "maskgit_halton", "--steps", "2", "--seeds", "0"]
    assert main(["compare", *arguments, *flags, "--output", str(tmp_path / "comparison")]) == 0, capsys.readouterr().err
    runs = json.loads((tmp_path / "comparison" / "results.json").read_text())["runs"]
    assert [(run["sampler"], run["guidance_scale"]) for run in runs] == [("maskgit", 0.5), ("maskgit_halton", 0.5)]
    assert main(["generate", "goldfish", *flags, "--negative-prompt", "fog", *output]) == 2
    assert "`negative_prompt` is not an argument of InfoGainMaskGITPipeline" in capsys.readouterr().err


def test_the_wrong_file_of_maskgit_is_refused(maskgit, tmp_path):
    wrong = tmp_path / "ImageNet_256_tiny.pth"
    wrong.write_bytes((maskgit.parent / "vq_ds16_c2i.pt").read_bytes())
    other = tmp_path / "vq_ds16_c2i.pt"
    other.write_bytes(maskgit.read_bytes())
    with pytest.raises(ValueError, match=r"ImageNet_256_tiny.pth must hold named tensors under one of the keys model_state_dict"):
        load(wrong, vqvae=maskgit.parent)
    with pytest.raises(
        ValueError, match=r"vq_ds16_c2i.pt: `shapes` must be those of a LlamaGen VQ checkpoint|must hold named tensors"
    ):
        load(maskgit, vqvae=other)


# Text


def test_a_language_model_as_published_and_as_converted(mmada, tmp_path, capsys):
    def texts_of(pipe):
        pipe.set_progress_bar_config(disable=True)
        return pipe("a red cat", max_new_tokens=5, generator=generators(0)).sequences

    pipe = InfoGainTextPipeline.from_pretrained(mmada)
    assert pipe.family.name == "mmada"
    assert pipe.family.mask_token_id == 126336
    assert main(["convert", str(mmada), str(tmp_path / "out"), "--text"]) == 0, capsys.readouterr().err
    again = InfoGainTextPipeline.from_pretrained(tmp_path / "out")
    assert again.family == pipe.family
    assert torch.equal(texts_of(again), texts_of(pipe))
    assert main(["convert", str(tmp_path / "out"), str(tmp_path / "twice"), "--text"]) == 2
    assert "is a diffusers folder for InfoGainTextPipeline already" in capsys.readouterr().err


# What does not fit


def copied(folder: Path, target: Path) -> Path:
    shutil.copytree(folder, target)
    return target


def test_a_missing_tensor_is_named_with_its_file(mmada, magvit, tmp_path):
    folder = copied(mmada, tmp_path / "mmada")
    file = folder / "model-00001-of-00002.safetensors"
    tensors = load_file(file)
    del tensors["model.transformer.blocks.0.attn_norm.weight"]
    save_file(tensors, file)
    with pytest.raises(
        ValueError, match=r"1 tensors of the BidirectionalLlama are missing: model.layers.0.input_layernorm.weight"
    ):
        load(folder, vqvae=magvit)


def test_an_extra_tensor_is_named_with_its_file(mmada, magvit, tmp_path):
    folder = copied(mmada, tmp_path / "mmada")
    file = folder / "model-00001-of-00002.safetensors"
    save_file({**load_file(file), "model.transformer.blocks.0.q_norm.weight": torch.ones(8)}, file)
    with pytest.raises(
        ValueError, match=r"model-00001-of-00002.safetensors has 1 keys .* model.transformer.blocks.0.q_norm.weight"
    ):
        load(folder, vqvae=magvit)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"model_type": "llada"}, "'llada'"),
        ({"codebook_size": 4096}, "`codebook_size` 4096 is not that of the image tokenizer"),
        ({"weight_tying": True}, "config.json: `weight_tying` must be False, got True"),
        ({"d_model": None}, "config.json: `d_model` must be an integer, got None"),
        (
            {"mlp_hidden_size": 48},
            r"must have the shape \((16, 48|48, 16)\) for this BidirectionalLlama, got \((16, 32|32, 16)\)",
        ),
        ({"vocab_size": 134000, "embedding_size": 134000}, "model.transformer.*must have the shape"),
    ],
)
def test_configurations_that_do_not_fit_are_named(mmada, magvit, tmp_path, change, text):
    folder = copied(mmada, tmp_path / "mmada")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ValueError, match=text):
        InfoGainMMaDAPipeline.from_pretrained(folder, vqvae=magvit)


def test_repositories_of_other_families_are_refused(tmp_path, stock_repository):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(
        ValueError, match=r"Cannot tell the model family of .* a config.json with the model type 'llama': supported"
    ):
        load(tmp_path)
    with pytest.raises(ValueError, match=r"`model_type` must be 'mmada', got 'llama'"):
        InfoGainMMaDAPipeline.from_pretrained(tmp_path)
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    with pytest.raises(ValueError, match=r"a model_index.json for 'StableDiffusionPipeline'"):
        load(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"which has neither model_index.json nor config.json"):
        load(tmp_path / "empty")
    with pytest.raises(OSError, match="'no/such' is neither a folder nor a Hub repository"):
        load("no/such", local_files_only=True)
    assert image_pipeline_class(stock_repository) is InfoGainPipeline
    assert type(load("demo")) is InfoGainPipeline


@pytest.mark.parametrize("write", [write_llada, write_dream, write_sdar, write_bert])
def test_text_models_are_loaded_and_converted_like_the_others(write, tmp_path, capsys):
    pipe = load(write(tmp_path / "model"), torch_dtype=torch.float32)
    assert type(pipe) is InfoGainTextPipeline
    assert main(["convert", str(tmp_path / "model"), str(tmp_path / "out")]) == 0, capsys.readouterr().err
    assert type(load(tmp_path / "out")) is InfoGainTextPipeline
    for folder in (tmp_path / "model", tmp_path / "out", "demo-text"):
        assert main(["generate", "a fox", "--model", str(folder), "--output", str(tmp_path / "images")]) == 2
        assert "is a text model: use it with `diffusers-infogain text` or `InfoGainTextPipeline`." in capsys.readouterr().err
    assert type(load("demo-text")) is InfoGainTextPipeline
    assert main(["convert", "demo-text", str(tmp_path / "demo")]) == 2
    assert "is a diffusers folder for InfoGainTextPipeline already" in capsys.readouterr().err


def test_unknown_arguments_are_refused(mmada, magvit):
    with pytest.raises(TypeError, match="guess"):
        load(mmada, vqvae=magvit, guess=True)
    with pytest.raises(TypeError, match="unexpected keyword argument 'guess'"):
        InfoGainTextPipeline.from_pretrained(mmada, guess="auto")


@pytest.mark.parametrize("argument", ["vqvae", "transformer", "tokenizer", "scheduler"])
@pytest.mark.parametrize("value", ["elsewhere", "x" * 100_000, Path("elsewhere")], ids=["name", "long name", "path"])
def test_a_saved_folder_takes_no_name_in_place_of_a_component(converted, argument, value):
    described = "a model" if argument in ("vqvae", "transformer") else f"a {argument}"
    with pytest.raises(ValueError, match=f"^`{argument}` must be {described}.* or None, got ") as error:
        InfoGainMMaDAPipeline.from_pretrained(converted, **{argument: value})
    assert len(str(error.value)) < 500


def test_dtypes_go_by_either_name(mmada):
    for name in ("dtype", "torch_dtype"):
        assert InfoGainTextPipeline.from_pretrained(mmada, **{name: torch.float64}).model.dtype == torch.float64
        assert InfoGainTextPipeline.from_pretrained("demo-text", **{name: torch.float64}).model.dtype == torch.float64


# The converter


def test_a_target_that_exists_is_left_alone(mmada, magvit, tmp_path, capsys):
    (tmp_path / "file").write_text("precious")
    assert main(["convert", str(mmada), str(tmp_path), "--vqvae", str(magvit)]) == 2
    assert "must not exist yet" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "precious"


def test_a_diffusers_folder_needs_no_conversion(stock_repository, converted, tmp_path, capsys):
    assert main(["convert", stock_repository, str(tmp_path / "out")]) == 2
    assert "is a diffusers folder for InfoGainPipeline already" in capsys.readouterr().err
    assert main(["convert", str(converted), str(tmp_path / "out")]) == 2
    assert "is a diffusers folder for InfoGainMMaDAPipeline already" in capsys.readouterr().err


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupted_conversion_leaves_nothing(mmada, magvit, tmp_path, monkeypatch, error):
    saved = []

    def save(*args, **kwargs):
        saved.append(args)
        if len(saved) == 2:
            raise error("stop")
        save_file(*args, **kwargs)

    monkeypatch.setattr(source, "save_file", save)
    convert = ["convert", str(mmada), str(tmp_path / "out"), "--vqvae", str(magvit), "--max-shard-size", "0.005"]
    assert main(convert) in (2, 130)
    assert os.listdir(tmp_path) == []


def test_a_model_that_computes_something_else_is_not_left_behind(mmada, magvit, tmp_path, monkeypatch, capsys):
    def save(tensors, *args, **kwargs):
        save_file({name: value * 1.5 for name, value in tensors.items()}, *args, **kwargs)

    monkeypatch.setattr(source, "save_file", save)
    assert main(["convert", str(mmada), str(tmp_path / "out"), "--vqvae", str(magvit)]) == 2
    assert "The converted transformer has other weights than the original, such as model.layers." in capsys.readouterr().err
    assert os.listdir(tmp_path) == []


def test_a_model_of_the_same_weights_that_computes_something_else_is_not_left_behind(
    mmada, magvit, tmp_path, monkeypatch, capsys
):
    outputs = iter(torch.tensor([[1.0, 2.0], [1.0, 2.5]]))
    monkeypatch.setattr(llada, "_probe", lambda model: next(outputs))
    assert main(["convert", str(mmada), str(tmp_path / "out"), "--vqvae", str(magvit)]) == 2
    error = "The converted transformer does not reproduce the original outputs: they differ by up to 0.5."
    assert error in capsys.readouterr().err
    assert os.listdir(tmp_path) == []


def test_one_shard_at_a_time_is_in_memory(mmada, magvit, tmp_path, monkeypatch):
    alive = []

    def save(tensors, *args, **kwargs):
        alive.append(sum(value.numel() * value.element_size() for value in tensors.values()))
        save_file(tensors, *args, **kwargs)

    monkeypatch.setattr(source, "save_file", save)
    main(["convert", str(mmada), str(tmp_path / "out"), "--vqvae", str(magvit), "--max-shard-size", "0.005"])
    largest_tensor = 134656 * 16 * 4
    assert max(alive) == largest_tensor  # larger than a shard: one by itself
    assert len(alive) == 4
