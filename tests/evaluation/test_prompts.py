from __future__ import annotations

import json
import re

import pytest

from diffusers_infogain.evaluation.prompts import SEED_STRIDE, Prompt, read_prompts, requests


def test_text_has_one_prompt_per_line(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a fox\n\n  a dog \n", encoding="utf-8")
    assert read_prompts(path) == [Prompt("a fox"), Prompt("a dog")]


def test_jsonl_keeps_what_else_a_line_says(tmp_path):
    lines = [{"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"}]
    path = tmp_path / "evaluation_metadata.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_prompts(path) == [Prompt("a photo of a bench", lines[0])]


def test_a_line_ends_where_the_file_format_says(tmp_path):
    for name, line in (("p.jsonl", '{"prompt": "a\u2028b"}'), ("p.txt", "a\u2028b")):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + f"{line}\r\n".encode())
        assert [prompt.text for prompt in read_prompts(tmp_path / name)] == ["a\u2028b"]


@pytest.mark.parametrize(
    "value",
    [
        ["tench, Tinca tinca", "goldfish"],
        {"1": "goldfish", "0": "tench, Tinca tinca"},
        {"id2label": {"1": "goldfish, Carassius auratus", "0": "tench"}},
    ],
)
def test_json_holds_class_names_in_the_order_of_their_ids(tmp_path, value):
    path = tmp_path / "classes.json"
    path.write_text(json.dumps(value))
    assert [prompt.text for prompt in read_prompts(path, "a photo of a {}")] == ["a photo of a tench", "a photo of a goldfish"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "\n", "a.txt holds no prompts."),
        ("a.jsonl", '{"prompt": "x"}\n{"text": "y"}\n', 'Line 2 of {path} is not a JSON object with a string "prompt".'),
        ("a.jsonl", "[1]", "Line 1 of {path} must hold a JSON object, got list."),
        ("a.jsonl", "{", "Line 1 of {path} is not JSON: Expecting property name"),
        ("a.json", "[" * 100_000, "{path} must be nested at most 64 levels deep"),
        ("a.json", '{"id2label": 5}', "{path} must hold a list of strings or a mapping from class ids to names."),
        ("a.json", '{"²": "x"}', "{path} must hold a list of strings or a mapping from class ids to names."),
        ("a.txt", "x" * 100_001, "Prompt 1 of {path} must have at most 100000 characters, got 100001."),
        ("a.txt", "a\0b", "{path} is not text: it contains a NUL byte."),
        ("a.json", '{"a": 1}', "must hold a list of strings or a mapping from class ids to names."),
    ],
)
def test_a_file_that_holds_no_prompts_is_named(tmp_path, name, text, message):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ValueError, match=re.escape(message.format(path=path))):
        read_prompts(path)


def test_a_template_needs_one_place(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("x")
    with pytest.raises(ValueError, match=re.escape("`template` must hold the place of the prompt, {}, once, got 'a photo'.")):
        read_prompts(path, "a photo")


def test_images_of_a_prompt_follow_each_other_with_their_own_seeds():
    every = requests([Prompt("a"), Prompt("b")], num_images=2, seed=7)
    assert [(r.prompt.text, r.prompt_index, r.seed, r.file) for r in every] == [
        ("a", 0, 7, "000000.png"),
        ("a", 0, 8, "000001.png"),
        ("b", 1, 9, "000002.png"),
        ("b", 1, 10, "000003.png"),
    ]


def test_genevals_layout():
    every = requests([Prompt("a"), Prompt("b")], num_images=2, layout="geneval")
    assert [r.file for r in every] == [f"0000{p}/samples/000{s}.png" for p in (0, 1) for s in (0, 1)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layout": "x"}, "`layout` must be one of plain, geneval, dpg, t2i_compbench, got 'x'."),
        ({"num_images": 0}, "`num_images` must be an integer >= 1, got 0."),
        ({"num_images": SEED_STRIDE + 1}, f"A run has at most {SEED_STRIDE} images, got 1 prompts x {SEED_STRIDE + 1}."),
    ],
)
def test_requests_that_cannot_be_met(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        requests([Prompt("a")], **arguments)
