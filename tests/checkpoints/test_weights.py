"""Reading public checkpoints: every key and shape checked, nothing run, nothing half written."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffusers_infogain.checkpoints.repository import HubArguments, local_folder
from diffusers_infogain.checkpoints.source import ModelSource
from diffusers_infogain.checkpoints.weights import Checkpoint, find_weights
from diffusers_infogain.files import read_json


class Small(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(3, 4)
        self.second = torch.nn.Linear(3, 4, bias=False)
        self.second.weight = self.first.weight

    def save_config(self, folder: Path) -> None:
        (folder / "config.json").write_text("{}")


TENSORS = {"a.first.weight": torch.arange(12.0).view(3, 4), "a.first.bias": torch.ones(4), "a.unused": torch.zeros(2)}


def source_of(*files: Path, wrapper=()) -> ModelSource:
    def convert_tensor(name: str, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.T if name == "first.weight" else tensor

    return ModelSource(Checkpoint(files, wrapper), Small, lambda model: model.first.bias, {"^a\\.": ""}, "unused", convert_tensor)


def saved(folder: Path, tensors=TENSORS, name="model.safetensors") -> Path:
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / name)
    return folder / name


def test_a_model_is_loaded_with_its_tensors_converted_and_tied(tmp_path):
    model = source_of(saved(tmp_path)).load()
    assert torch.equal(model.first.weight, TENSORS["a.first.weight"].T)
    assert model.second.weight is model.first.weight
    assert not model.training
    assert source_of(saved(tmp_path)).load(torch.bfloat16).first.bias.dtype == torch.bfloat16


@pytest.mark.parametrize("shard_size", [10**9, 20])
def test_a_model_is_written_in_shards_that_hold_every_tensor_once(tmp_path, shard_size):
    source, target = source_of(saved(tmp_path)), tmp_path / "target"
    target.mkdir()
    assert source.write(target, shard_size=shard_size) == 4 * 16
    files = sorted(path.name for path in target.glob("*.safetensors"))
    stored = {key: value for file in files for key, value in load_file(target / file).items()}
    assert stored.keys() == {"first.weight", "first.bias"}
    assert torch.equal(stored["first.weight"], TENSORS["a.first.weight"].T)
    if shard_size == 20:
        assert files == [f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
        index = json.loads((target / "diffusion_pytorch_model.safetensors.index.json").read_text())
        assert index["weight_map"].keys() == stored.keys()
    else:
        assert files == ["diffusion_pytorch_model.safetensors"]


def test_the_index_leads_to_the_shards(tmp_path):
    saved(tmp_path, {"x": torch.ones(1)}, "one.safetensors")
    saved(tmp_path, {"y": torch.zeros(2)}, "two.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "one.safetensors", "y": "two.safetensors"}}))
    checkpoint = find_weights(tmp_path, ["model.safetensors"])
    assert checkpoint.shapes == {"x": (1,), "y": (2,)}
    assert checkpoint.tensor("y").tolist() == [0, 0]
    assert checkpoint.file_of("x").name == "one.safetensors"
    (tmp_path / "two.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model.safetensors.index.json names files that are missing: two.safetensors"):
        find_weights(tmp_path, ["model.safetensors"])
    index.write_text(json.dumps({"weight_map": {"x": "../one.safetensors"}}))
    with pytest.raises(ValueError, match=r"names files that are missing: \.\./one"):
        find_weights(tmp_path, ["model.safetensors"])


@pytest.mark.parametrize("legacy", [False, True])
def test_pickles_of_tensors_are_read_inside_their_wrapper(tmp_path, legacy):
    file = tmp_path / "model.pth"
    torch.save({"iter": 3, "model": TENSORS}, file, _use_new_zipfile_serialization=not legacy)
    model = source_of(file, wrapper=("model",)).load()
    assert torch.equal(model.first.weight, TENSORS["a.first.weight"].T)


class Evil:
    def __reduce__(self):
        return (print, ("this must not run",))


def test_a_pickle_that_needs_code_is_refused(tmp_path, capsys):
    file = tmp_path / "evil.pth"
    torch.save({"model": TENSORS, "extra": Evil()}, file)
    with pytest.raises(ValueError, match=r"evil.pth is a pickle that needs code to be read"):
        Checkpoint([file], ("model",))
    file.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match=r"evil.pth is a pickle that needs code to be read"):
        Checkpoint([file], ("model",))
    assert capsys.readouterr().out == ""


def test_damaged_files_are_named(tmp_path):
    whole = saved(tmp_path)
    whole.write_bytes(whole.read_bytes()[:40])
    with pytest.raises(ValueError, match=r"model.safetensors is not a safetensors file, or is damaged"):
        Checkpoint([whole])
    file = tmp_path / "cut.pth"
    torch.save(TENSORS, file)
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"cut.pth (cannot be read|is a pickle)"):
        Checkpoint([file])
    torch.save({"epoch": 3}, file)
    with pytest.raises(
        ValueError, match=r"cut.pth must hold named tensors under one of the keys model, or at the top, got epoch"
    ):
        Checkpoint([file], ("model",))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"a.first.weight": None}, "model.safetensors: 1 tensors of the Small are missing: first.weight"),
        ({"a.third": torch.ones(1)}, "model.safetensors has 1 keys that a Small does not have: a.third"),
        (
            {"a.first.bias": torch.ones(5)},
            r"model.safetensors: a.first.bias must have the shape \(4,\) for this Small, got \(5,\)",
        ),
    ],
)
def test_keys_and_shapes_that_do_not_fit_are_named(tmp_path, change, text):
    tensors = {key: value for key, value in {**TENSORS, **change}.items() if value is not None}
    with pytest.raises(ValueError, match=text):
        source_of(saved(tmp_path, tensors)).load()


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(ValueError, match=r"has no weights: none of a.safetensors, b.bin"):
        find_weights(tmp_path, ["a.safetensors", "b.bin"])
    with pytest.raises(ValueError, match=r"config.json is missing"):
        read_json(tmp_path / "config.json")
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"config.json must hold a JSON object, got list"):
        read_json(tmp_path / "config.json")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json is not JSON"):
        read_json(tmp_path / "config.json")
    with pytest.raises(OSError, match=r"'no/such' is neither a folder nor a Hub repository that can be read"):
        local_folder("no/such", ["*"], HubArguments(local_files_only=True))
