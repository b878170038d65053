"""Damaged and huge arrays; no pickle runs code."""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest

from diffusers_infogain import tensor_files


def test_arrays_are_read_by_name(tmp_path):
    path = tmp_path / "a.npz"
    arrays = {"mu": np.arange(3.0), "sigma": np.asfortranarray(np.arange(6.0).reshape(2, 3)), "n": np.array(7)}
    for save in (np.savez, np.savez_compressed):
        save(path, **arrays, other=np.array([{}], dtype=object))
        found = tensor_files.read_npz(path, ["mu", "sigma"], ["n", "absent"])
        assert found.keys() == arrays.keys()
        for name, value in arrays.items():
            np.testing.assert_array_equal(found[name], value, strict=True)
    with pytest.raises(ValueError, match=r"a\.npz must hold `mu` and `absent`, got mu, sigma, n, other"):
        tensor_files.read_npz(path, ["mu", "absent"])
    with pytest.raises(ValueError, match=r"`other` of .*a\.npz must hold numbers, got the type object; pickled objects"):
        tensor_files.read_npz(path, ["other"])
    whole = path.read_bytes()
    for size in (0, 1, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"a\.npz is not an \.npz file, or is damaged"):
            tensor_files.read_npz(path, ["mu"])
    path.write_bytes(pickle.dumps(arrays))
    with pytest.raises(ValueError, match=r"a\.npz is not an \.npz file, or is damaged"):
        tensor_files.read_npz(path, ["mu"])


def array_file(shape, content=b""):
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<f8", "fortran_order": False, "shape": shape})
    return file.getvalue() + content


def test_arrays_that_would_fill_the_memory_are_refused(tmp_path):
    path = tmp_path / "bomb.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("claims.npy", array_file((10**15,), bytes(16)))
        with archive.open("packed.npy", "w", force_zip64=True) as file:
            for _ in range(5):
                file.write(bytes(2**26))
    with pytest.raises(ValueError, match=r"`claims` of .*bomb\.npz is damaged: its size does not fit its shape"):
        tensor_files.read_npz(path, ["claims"])
    with pytest.raises(ValueError, match=r"`packed` of .*bomb\.npz must have at most \d+ bytes, got 335544320"):
        tensor_files.read_npz(path, ["packed"])


def test_nothing_in_the_package_unpickles():
    """Pickles run code: only torch's reader of tensors (`weights_only=True`) may touch one, in one place."""
    forbidden = (
        "pickle.load",
        "torch.load(",
        "np.load(",
        "numpy.load(",
        "joblib",
        "sqlitedict",
        "SqliteDict",
        "shelve",
        "marshal",
    )
    root = Path(tensor_files.__file__).parent
    sources = {path.relative_to(root): path.read_text(encoding="utf-8") for path in root.rglob("*.py")}
    found = [(str(path), word) for path, source in sources.items() for word in forbidden if word in source]
    assert found == [("tensor_files.py", "torch.load(")]
    assert sources[Path("tensor_files.py")].count("weights_only") >= sources[Path("tensor_files.py")].count("torch.load(")
    assert "allow_pickle=True" not in "".join(sources.values())
    examples = root.parent / "examples"
    lines = [line for path in examples.rglob("*.py") for line in path.read_text(encoding="utf-8").splitlines()]
    assert all("weights_only=True" in line for line in lines if "torch.load(" in line)
    assert not any(word in line for line in lines for word in forbidden if word != "torch.load(")
