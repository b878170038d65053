"""The page as programs see it: built by gradio, called through its own client."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

from diffusers_infogain import load
from diffusers_infogain.app import serve
from diffusers_infogain.app.serve import free_port, load_gradio
from diffusers_infogain.app.work import Limits
from diffusers_infogain.image_files import read_png_metadata

gradio = pytest.importorskip("gradio", reason="the page needs the extra app")
from gradio_client import Client, handle_file  # noqa: E402

LIMITS = Limits(steps=20, samples=3, new_tokens=20, waiting=7)


def served(model: str, folder: Path):
    pipe = load(model)
    pipe.set_progress_bar_config(disable=True)
    return serve.serving(pipe, model, port=0, limits=LIMITS)


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    with served("demo", folder) as address:
        assert address.startswith("http://127.0.0.1:")
        temporary = Path(os.environ["GRADIO_TEMP_DIR"])
        assert temporary.exists()
        yield Client(address, verbose=False, download_files=str(folder))
    assert not temporary.exists()
    assert "GRADIO_TEMP_DIR" not in os.environ


@pytest.fixture(scope="module")
def writer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    with served("demo-text", folder) as address:
        yield Client(address, verbose=False, download_files=str(folder))


def pictures(gallery) -> list[Path]:
    return [Path(item["image"]) for item in gallery]


def names_of(client: Client, endpoint: str) -> list[str]:
    endpoints = client.view_api(return_format="dict")["named_endpoints"]
    return [parameter["parameter_name"] for parameter in endpoints[endpoint]["parameters"]]


def test_programs_see_what_visitors_can_do_and_nothing_else(client):
    assert set(client.view_api(return_format="dict")["named_endpoints"]) == {"/generate", "/compare", "/edit"}
    names = names_of(client, "/generate")
    assert names[:5] == ["prompt", "seed", "samples", "guidance_scale", "negative_prompt"]
    assert {"sampler", "steps", "num_candidates", "lazy_threshold"} <= set(names)
    assert {"first_sampler", "second_sampler", "second_steps"} <= set(names_of(client, "/compare"))


def test_pictures_are_those_of_the_pipeline_and_say_how_they_were_made(client, demo_pipe):
    gallery, line, film, *_ = client.predict("a red circle", 5, 1, api_name="/generate")
    (path,) = pictures(gallery)
    expected = demo_pipe("a red circle", generator=torch.Generator().manual_seed(5)).images[0]
    assert PIL.Image.open(path).tobytes() == expected.tobytes()
    record = read_png_metadata(path)
    assert (record["prompt"], record["seed"]) == ("a red circle", 5)
    assert "model rows (NFE)" in line
    assert film.count("<img") >= 3


@pytest.mark.parametrize(
    ("entered", "message"),
    [
        ({"prompt": " "}, "“Prompt” must not be empty."),
        ({"samples": 2.5}, "“How many” must be a whole number, got 2.5."),
        ({"seed": -3}, "“Seed” must be an integer >= 0, got -3."),
        ({"token_temperature": "<b>"}, "“Token temperature” must be one number or two (start end), got '&lt;b&gt;'."),
    ],
)
def test_a_wrong_entry_is_one_sentence_on_the_page(client, entered, message):
    with pytest.raises(Exception) as error:
        client.predict(**{"prompt": "a red circle", **entered}, api_name="/generate")
    assert message.replace(">=", "&gt;=") in str(error.value)  # it is shown as HTML
    assert "Traceback" not in str(error.value)


def test_requests_beyond_the_limits_are_turned_away(client):
    for entered in ({"steps": 21}, {"samples": 4}):
        with pytest.raises(Exception, match=r"20|3"):
            client.predict(**{"prompt": "a red circle", **entered}, api_name="/generate")


def test_a_bug_is_said_to_be_one_and_shows_no_traceback(client, monkeypatch):
    from diffusers_infogain.app import controls

    monkeypatch.setattr(controls, "run", lambda *arguments: 1 / 0)
    with pytest.raises(Exception) as error:
        client.predict("a red circle", api_name="/generate")
    assert "division by zero" in str(error.value)
    assert "line" not in str(error.value)


def test_two_samplers_side_by_side(client):
    table, *sides = client.predict("two blue squares", 1, 1, first_sampler="fast", second_sampler="maskgit", api_name="/compare")
    assert "fast (preset)" in table
    assert "maskgit</th>" in table
    assert "Model rows (NFE)" in table
    first, second = pictures(sides[0])[0], pictures(sides[2])[0]
    assert [read_png_metadata(path)["scheduler"]["sampler"] for path in (first, second)] == ["halton", "maskgit"]
    assert {read_png_metadata(path)["seed"] for path in (first, second)} == {1}


def test_painting_changes_only_what_is_painted(client, demo_pipe, tmp_path):
    image = demo_pipe("a red circle", generator=torch.Generator().manual_seed(5)).images[0]
    large = image.resize((512, 512), PIL.Image.Resampling.NEAREST)
    layer = PIL.Image.new("RGBA", large.size)
    layer.paste((225, 29, 72, 255), (0, 0, 512, 256))
    for name, picture in (("background", large), ("layer", layer)):
        picture.convert("RGBA").save(tmp_path / f"{name}.png")
    background, painted = (handle_file(str(tmp_path / f"{name}.png")) for name in ("background", "layer"))
    editor = {"background": background, "layers": [painted], "composite": background}
    gallery, line, film = client.predict(editor, "a blue square", "Only what I paint", api_name="/edit")
    (path,) = pictures(gallery)
    edited, before = np.array(PIL.Image.open(path)), np.array(image)
    assert np.array_equal(edited[32:], before[32:])
    assert not np.array_equal(edited[:32], before[:32])
    assert "model row" in line
    assert "<img" in film
    whole, *_ = client.predict(editor, "a blue square", "The whole picture", 0.5, api_name="/edit")
    assert not np.array_equal(np.array(PIL.Image.open(pictures(whole)[0]))[32:], before[32:])
    with pytest.raises(Exception, match="Nothing is painted"):
        client.predict({**editor, "layers": []}, "a blue square", "Only what I paint", api_name="/edit")


def test_texts_are_written_and_masks_filled_in(writer):
    assert set(writer.view_api(return_format="dict")["named_endpoints"]) == {"/write", "/compare"}
    text, line, coloured, *_ = writer.predict("M07*12=", new_tokens=10, api_name="/write")
    assert set(text) <= {*"01", "*"}
    assert len(text) == 10
    assert "model row" in line
    assert coloured.count("<span") >= 10
    text, *_ = writer.predict("S12__3___________", api_name="/write")
    assert text.startswith("S12")
    assert len(text) == 17
    assert "_" not in text
    table, *sides = writer.predict("S12__3___________", first_sampler="text", second_sampler="left", api_name="/compare")
    assert "text (preset)" in table
    assert all(side.startswith("S12") for side in sides[::2])


def test_a_page_measures_nothing_and_asks_no_server():
    load_gradio()
    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"
    from diffusers_infogain.app.page import build_page, theme

    styles = json.dumps([theme()._get_theme_css(), theme()._stylesheets]).replace("http://www.w3.org/2000/svg", "")
    assert "http" not in styles
    assert "@import" not in styles
    page, _ = build_page(load("demo-text"), "demo-text", LIMITS, str)
    assert not page.analytics_enabled
    assert page._queue.max_size == 7
    one_at_a_time = {block.concurrency_limit for block in page.fns.values() if block.concurrency_id == "the model"}
    assert one_at_a_time == {1}


def test_a_port_in_use_is_said(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ValueError) as error:
            free_port("127.0.0.1", port)
    assert str(error.value) == (
        f"--host 127.0.0.1 and --port {port} cannot be used (address already in use): choose another port, or 0 for a free one."
    )
    assert free_port("127.0.0.1", 0) > 0
    with pytest.raises(ValueError) as error:
        free_port("no host", 0)
    assert str(error.value) == "--host must be an address or a name of this machine, got 'no host'."
