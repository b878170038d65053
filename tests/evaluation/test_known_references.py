from __future__ import annotations

import dataclasses
import hashlib
import re

import numpy as np
import pytest

from diffusers_infogain.choices import RESIZES
from diffusers_infogain.evaluation import known_references
from diffusers_infogain.evaluation.known_references import FOLDER_VARIABLE, KNOWN_REFERENCES, find_file
from diffusers_infogain.evaluation.measure_settings import MeasureSettings
from diffusers_infogain.evaluation.reference import ReferenceStatistics, write_reference

NAME = "adm-imagenet256"


@pytest.fixture
def file(tmp_path, monkeypatch):
    """A small file in the place of ADM's, with a checksum of its own."""
    path = tmp_path / "VIRTUAL_imagenet256_labeled.npz"
    write_reference(path, ReferenceStatistics(np.zeros(64), np.eye(64), np.zeros(4), np.eye(4)))
    checksum = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setitem(KNOWN_REFERENCES, NAME, dataclasses.replace(KNOWN_REFERENCES[NAME], sha256=checksum))
    monkeypatch.delenv(FOLDER_VARIABLE, raising=False)
    return path


def test_the_table_says_where_each_file_is_from_and_how_it_was_made():
    assert {"adm-imagenet256", "adm-imagenet512", "t2i-coco30k", "clean-fid-ffhq-trainval70k-256"} <= set(KNOWN_REFERENCES)
    assert len({known.url for known in KNOWN_REFERENCES.values()}) == len(KNOWN_REFERENCES) > 30
    for name, known in KNOWN_REFERENCES.items():
        assert re.fullmatch(r"[a-z0-9-]+", name)
        assert known.url.startswith("https://")
        assert known.file_name.endswith(".npz")
        assert known.resize in RESIZES
        assert known.sha256 is None or re.fullmatch("[0-9a-f]{64}", known.sha256)
    assert KNOWN_REFERENCES["clean-fid-lsun-cat-trainfull-256"].file_name == "lsun_cat_clean_trainfull_256.npz"
    legacy = KNOWN_REFERENCES["clean-fid-legacy-cifar10-test-32"]
    assert (legacy.file_name, legacy.resize) == ("cifar10_legacy_tensorflow_test_32.npz", "network")


def test_the_file_is_the_one_given_or_that_of_its_name_in_a_folder(file, monkeypatch):
    assert find_file(NAME, file) == find_file(NAME, file.parent) == file
    monkeypatch.setenv(FOLDER_VARIABLE, str(file.parent))
    assert find_file(NAME, None) == file
    other = file.rename(file.with_name("renamed.npz"))
    assert find_file(NAME, other) == other
    message = r"`reference_file` must be the file of adm-imagenet256, got .*labeled.npz, which is missing: download https"
    with pytest.raises(ValueError, match=message):
        find_file(NAME, None)


def test_a_missing_file_is_said_with_its_source(file):
    with pytest.raises(ValueError, match="`reference_file` must be given") as caught:
        find_file(NAME, None)
    assert str(caught.value) == (
        "`reference_file` must be given for adm-imagenet256, or the folder of its file in $INFOGAIN_REFERENCES: "
        f"download {KNOWN_REFERENCES[NAME].url}."
    )


def test_another_file_than_the_checksum_says_is_refused(file):
    file.write_bytes(file.read_bytes() + b"more")
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    expected = KNOWN_REFERENCES[NAME].sha256
    message = f"`reference_file` must have the SHA-256 {expected} of {NAME}, got {file} with {found}."
    with pytest.raises(ValueError, match=re.escape(message)):
        find_file(NAME, file)


def test_a_checksum_is_computed_again_only_after_a_change(file, monkeypatch):
    first = known_references.sha256(file)
    assert first == hashlib.sha256(file.read_bytes()).hexdigest()
    monkeypatch.setattr(hashlib, "file_digest", None)  # which would fail
    assert known_references.sha256(file) == first


def test_published_statistics_stand_for_their_file_with_their_own_resizing(file):
    settings = MeasureSettings(reference=NAME, reference_file=file)
    by_path = MeasureSettings(reference=str(file))
    assert settings.resize_used == by_path.resize_used == "network"
    assert settings.statistics.origin.num_images == 1_281_167
    assert settings.statistics.origin.weights == settings.weights_of("inception")
    assert by_path.statistics.origin is None
    assert settings.identity(["frechet"]) == by_path.identity(["frechet"])
    clean = "clean-fid-ffhq-trainval70k-256"
    assert MeasureSettings(reference=clean, reference_file=file).resize_used == "clean"
    assert KNOWN_REFERENCES[clean].sha256 is None


@pytest.mark.parametrize(
    ("metrics", "changes", "message"),
    [
        (["kid"], {}, "`reference` must be a folder of images for kid, got adm-imagenet256."),
        (["cmmd"], {}, "`reference` must be a folder of images for cmmd, got adm-imagenet256."),
        (["frechet"], {}, "`reference` must be statistics of demo for frechet, got adm-imagenet256 of inception."),
        (
            ["frechet"],
            {"reference": "a.npz"},
            "`reference_file` must be left out unless `reference` names published statistics",
        ),
    ],
)
def test_what_published_statistics_do_not_serve_is_said(file, metrics, changes, message):
    settings = MeasureSettings(**{"reference": NAME, "reference_file": file, "features": "demo", **changes})
    with pytest.raises(ValueError, match=re.escape(message)):
        settings.check(metrics)
