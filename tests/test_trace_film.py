"""Frames and film files; that they show what was decoded is tested for all families in dialect/test_traces_of_images.py."""

from __future__ import annotations

import sys

import numpy as np
import PIL.Image
import pytest
import torch

from diffusers_infogain import InfoGainScheduler
from diffusers_infogain.trace_film import enlarged, frame_size, save_film

PROMPT = "a red circle above a blue square"


@pytest.fixture(scope="module")
def trace(demo_pipe):
    scheduler, demo_pipe.scheduler = (
        demo_pipe.scheduler,
        InfoGainScheduler.from_config(demo_pipe.scheduler.config, entropy_bound=0),
    )
    output = demo_pipe(PROMPT, generator=torch.Generator().manual_seed(0), num_inference_steps=5)
    demo_pipe.scheduler = scheduler
    return output.trace


@pytest.mark.parametrize(
    ("image", "size", "expected"),
    [
        ((64, 64), None, (256, 256)),
        ((100, 50), None, (300, 150)),
        ((256, 256), None, (256, 256)),
        ((512, 1024), None, (512, 1024)),
        ((64, 32), 512, (512, 256)),
        ((512, 256), 100, (100, 50)),
        ((1000, 1), 10, (10, 1)),
    ],
)
def test_small_images_are_enlarged_by_a_whole_factor(image, size, expected):
    assert frame_size(*image, size) == expected
    assert enlarged(PIL.Image.new("RGB", image), size).size == expected


def test_enlarged_pixels_stay_as_they_are():
    image = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 32, 3), dtype=np.uint8))
    assert np.array_equal(np.array(enlarged(image)), np.array(image).repeat(4, 0).repeat(4, 1))


@pytest.mark.parametrize("size", [0, -1, 1.5, "big", True, 2**20])
def test_sizes_that_are_none_are_refused(trace, size):
    with pytest.raises(ValueError, match=r"^`size` must be an integer "):
        trace.frames(size=size)


@pytest.mark.parametrize("suffix", ["gif", "webp", "GIF"])
def test_a_film_has_a_frame_for_every_state_and_stays_on_the_last(trace, tmp_path, suffix):
    path = trace.film(tmp_path / f"film.{suffix}", seconds_per_step=0.1, seconds_at_end=1.5, size=64)
    frames = trace.frames(size=64)
    with PIL.Image.open(path) as film:
        assert film.n_frames == len(frames) == len(trace.states()) == 6
        durations = []
        for number, frame in enumerate(frames):
            film.seek(number)
            film.load()
            durations.append(film.info["duration"])
            found = np.array(film.convert("RGB")).astype(int)
            assert np.abs(found - np.array(frame)).mean() < 6
        assert durations == [100] * 5 + [1600]
        assert film.info["loop"] == 0
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_film_replaces_a_file_only_when_it_is_whole(trace, tmp_path, monkeypatch):
    path = tmp_path / "film.gif"
    path.write_bytes(b"before")
    monkeypatch.setattr(PIL.Image.Image, "save", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trace.film(path)
    assert path.read_bytes() == b"before"
    assert [file.name for file in tmp_path.iterdir()] == ["film.gif"]


@pytest.mark.parametrize("name", ["film", "film.png", "film.avi", "gif", "film.gif/"])
def test_other_kinds_of_files_are_refused(trace, tmp_path, name):
    if name.endswith("/"):
        (tmp_path / name).mkdir()
        with pytest.raises(ValueError, match="must be a file, got a folder"):
            trace.film(tmp_path / name)
        return
    with pytest.raises(ValueError, match=rf"^`path` of a film must end in \.gif, \.webp or \.mp4, got '.*{name}'\.$"):
        trace.film(tmp_path / name)


@pytest.mark.parametrize(("name", "value"), [("seconds_per_step", 0), ("seconds_per_step", "1"), ("seconds_at_end", -1)])
def test_times_that_are_none_are_refused(trace, tmp_path, name, value):
    with pytest.raises(ValueError, match=f"^`{name}` must be a number"):
        trace.film(tmp_path / "film.gif", **{name: value})


def test_mp4_needs_an_extra(trace, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    with pytest.raises(ModuleNotFoundError, match=r"^Films in \.mp4 need imageio-ffmpeg: .*\[film\]"):
        trace.film(tmp_path / "film.mp4")
    assert not list(tmp_path.iterdir())


def test_mp4_has_as_many_frames_as_it_lasts(tmp_path):
    imageio_ffmpeg = pytest.importorskip("imageio_ffmpeg")
    frames = [PIL.Image.new("RGB", (65, 33), color) for color in ("red", "green", "blue")]
    path = save_film(frames, tmp_path / "film.mp4", 0.25, 1.0)
    assert imageio_ffmpeg.count_frames_and_secs(str(path)) == (7, pytest.approx(1.75))
    reader = imageio_ffmpeg.read_frames(str(path))
    assert next(reader)["size"] == (66, 34)
    first = np.frombuffer(next(reader), np.uint8).reshape(34, 66, 3)
    assert np.abs(first.mean((0, 1)) - (255, 0, 0)).max() < 12
    assert [file.name for file in tmp_path.iterdir()] == ["film.mp4"]
