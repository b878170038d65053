"""Checkpoints that somebody bent: configurations, indices, tokenizers and weights of any content end soon, in one sentence."""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
from helpers.amused import make_components
from helpers.checkpoints import make_mmada_pipeline
from helpers.checkpoints_meissonic import write_meissonic_repository
from helpers.checkpoints_text import write_bert, write_dream, write_llada, write_sdar

from diffusers_infogain import InfoGainPipeline, load


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    InfoGainPipeline(**make_components()).save_pretrained(root / "amused")
    make_mmada_pipeline().save_pretrained(root / "mmada")
    writers = {"llada": write_llada, "dream": write_dream, "sdar": write_sdar, "bert": write_bert}
    for name, write in writers.items():
        write(root / f"published-{name}")
    write_meissonic_repository(root / "published-meissonic", True)
    for name in ("meissonic", "llada", "bert"):
        load(root / f"published-{name}").save_pretrained(root / name)
    return {path.name: path for path in sorted(root.iterdir())}


def copied(folder: Path, target: Path, file: str, content: bytes) -> Path:
    """A copy of the folder, in links, with other content of one file."""
    shutil.copytree(folder, target, copy_function=lambda source, link: Path(link).symlink_to(source))
    (target / file).unlink()
    (target / file).write_bytes(content)
    return target


def check_sentence(folder: Path, file: str) -> None:
    with pytest.raises((ValueError, OSError)) as error:
        load(folder)
    text = str(error.value)
    assert "\n" not in text
    assert len(text) < 2500
    assert any(name in text for name in (str(folder), file, Path(file).name, f"{Path(file).parent.name}/")), text


@pytest.mark.parametrize("value", [10**6, 10**9, 2**63, -1, "x" * 10**6, {"a": 1}])
@pytest.mark.parametrize(
    ("family", "file", "field"),
    [
        ("amused", "transformer/config.json", "num_hidden_layers"),
        ("amused", "text_encoder/config.json", "num_hidden_layers"),
        ("amused", "text_encoder/config.json", "vocab_size"),
        ("amused", "vqvae/config.json", "layers_per_block"),
        ("meissonic", "transformer/config.json", "num_single_layers"),
        ("mmada", "vqvae/config.json", "bits"),
        ("mmada", "transformer/config.json", "num_hidden_layers"),
        ("llada", "model/config.json", "hidden_size"),
        ("bert", "model/config.json", "num_hidden_layers"),
        ("published-bert", "config.json", "num_hidden_layers"),
        ("published-bert", "config.json", "max_position_embeddings"),
        ("published-llada", "config.json", "n_layers"),
        ("published-dream", "config.json", "num_hidden_layers"),
        ("published-meissonic", "transformer/config.json", "num_layers"),
        ("published-meissonic", "vqvae/config.json", "block_out_channels"),
    ],
)
def test_sizes_that_the_weights_do_not_have(folders, tmp_path, family, file, field, value):
    config = json.loads((folders[family] / file).read_text())
    content = json.dumps({**config, field: value}).encode()
    check_sentence(copied(folders[family], tmp_path / "model", file, content), file)


@pytest.mark.parametrize("family", ["amused", "bert", "llada", "published-bert", "published-dream"])
def test_labels_are_not_counted_up(folders, tmp_path, family):
    file = {"amused": "text_encoder/config.json"}.get(family, "config.json" if "published" in family else "model/config.json")
    config = json.loads((folders[family] / file).read_text())
    content = json.dumps({**config, "num_labels": 10**9}).encode()
    check_sentence(copied(folders[family], tmp_path / "model", file, content), file)


@pytest.mark.parametrize("field", ["attn_implementation", "_attn_implementation", "experts_implementation"])
@pytest.mark.parametrize("family", ["amused", "llada", "bert", "published-bert", "published-dream", "published-meissonic"])
def test_kernels_that_a_configuration_asks_for_are_not_looked_for(folders, tmp_path, family, field):
    parts = [path for path in folders[family].rglob("config.json") if "hidden_size" in path.read_text()]
    file = str(parts[0].relative_to(folders[family]))
    config = json.loads((folders[family] / file).read_text())
    content = json.dumps({**config, field: "kernels-community/flash-attn"}).encode()
    pipe = load(copied(folders[family], tmp_path / "model", file, content))
    configs = [model.config for model in pipe.components.values() if hasattr(model, "config")]
    chosen = [str(config._attn_implementation) for config in configs if hasattr(config, "_attn_implementation")]
    assert chosen
    assert not any("kernels" in name for name in chosen)


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json", "model.safetensors", "vocab.txt"])
def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(folders, tmp_path, file):
    folder = copied(folders["published-bert"], tmp_path / "model", file, b"")
    (folder / file).unlink()
    os.mkfifo(folder / file)
    check_sentence(folder, file)


# Whatever comes

VALUES: list[Any] = [
    *(None, True, False, 0, -1, 1, 3, 10**6, 10**9, 10**12, 2**63, 10**30, -(10**9), 0.5, 1e308, float("nan"), float("inf")),
    *("", "x", "x" * 10**5, "\ud800", "../../etc/passwd", "float16", "kernels-community/x"),
    *([], [1], ["a"], [[]], [10**9] * 3, [None], {}, {"a": 1}, {"": {}}, [1] * 1000),
]
FIELDS = (
    "num_labels",
    "id2label",
    "auto_map",
    "layer_types",
    "dtype",
    "rope_scaling",
    "rope_parameters",
    "text_config",
    "head_dim",
)


def bent(value: Any, rng: random.Random, depth: int = 0) -> Any:
    """The value with one part replaced or left out."""
    if isinstance(value, dict) and value and (depth == 0 or rng.random() < 0.6):
        key = rng.choice(list(value))
        rest = {name: part for name, part in value.items() if name != key}
        return rest if rng.random() < 0.1 else {**rest, key: bent(value[key], rng, depth + 1)}
    if isinstance(value, list) and value and rng.random() < 0.5:
        return [*value[1:], bent(rng.choice(value), rng, depth + 1)]
    return rng.choice(VALUES)


def bent_json(value: Any, rng: random.Random) -> bytes:
    for _ in range(rng.choice([1, 1, 2, 3])):
        if isinstance(value, dict) and rng.random() < 0.1:
            value = {**value, rng.choice(FIELDS): rng.choice(VALUES)}
        else:
            value = bent(value, rng) if isinstance(value, dict) and rng.random() < 0.97 else rng.choice(VALUES)
    return json.dumps(value).encode("utf-8", "surrogatepass")


def bent_file(file: Path, rng: random.Random) -> bytes:
    content = file.read_bytes()
    if file.suffix == ".json" and len(content) < 300_000 and rng.random() < 0.85:
        return bent_json(json.loads(content), rng)
    if file.suffix == ".safetensors" and rng.random() < 0.7:
        length = struct.unpack("<Q", content[:8])[0]
        header = b"[" * 10**5 if rng.random() < 0.1 else bent_json(json.loads(content[8 : 8 + length]), rng)
        told = rng.choice([len(header)] * 8 + [2**63, 10**9])
        return struct.pack("<Q", told) + header + content[8 + length :]
    noisy = bytearray(content)
    for _ in range(rng.choice([1, 3, 20])):
        if noisy:
            noisy[rng.randrange(min(len(noisy), 5000))] = rng.randrange(256)
    cut = content[: rng.randrange(len(content) + 1)]
    return rng.choice([cut, bytes(noisy), b"", b"[" * 10**5, rng.randbytes(200), b"\x80\x04."])


@pytest.mark.parametrize("seed", [*range(8), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(8, 300))])
def test_bent_files_load_or_end_in_one_sentence(folders, tmp_path, seed):
    rng = random.Random(seed)
    for i in range(10):
        folder = folders[rng.choice(list(folders))]
        every = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.stat().st_size < 400_000]
        path = rng.choice([path for path in every if path.suffix in (".json", ".safetensors", ".txt", ".jinja")])
        file = str(path.relative_to(folder))
        copy = copied(folder, tmp_path / str(i), file, bent_file(path, rng))
        try:
            load(copy)
        except (ValueError, OSError) as error:
            text = str(error)
            assert "\n" not in text
            assert len(text) < 2500
            assert any(name in text for name in (str(copy), path.name, f"{(copy / file).parent.name}/")), (file, text)
