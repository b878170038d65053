from __future__ import annotations

import json
import types

import PIL.Image
import pytest
import torch
from helpers.commands import run
from test_pipeline_infogain_text import make_pipe

from diffusers_infogain import choices, cli
from diffusers_infogain.evaluation import text_comparison
from diffusers_infogain.pipeline_infogain_text import InfoGainTextPipeline
from diffusers_infogain.token_frequencies import save_token_frequencies


def test_texts_are_printed(capsys):
    code, out, _ = run(capsys, "text", "S", "M", "--max-new-tokens", 16, "--device", "cpu")
    assert code == 0
    assert len(out.split()) == 2
    code, out, _ = run(capsys, "text", "S12__3___________", "--max-new-tokens", 0, "--device", "cpu")
    assert code == 0
    assert out.startswith("S12")
    assert len(out.strip()) == 17


def test_a_file_of_texts_goes_on_where_it_was_cut(capsys, tmp_path):
    prompts, output = tmp_path / "prompts.txt", tmp_path / "texts.jsonl"
    prompts.write_text("S\nM\nS1\n")
    flags = [
        "--prompts-file",
        prompts,
        "--output",
        output,
        "--max-new-tokens",
        8,
        "--num-texts",
        2,
        "--batch-size",
        2,
        "--device",
        "cpu",
    ]
    assert run(capsys, "text", *flags)[0] == 0
    whole = output.read_text()
    records = [json.loads(line) for line in whole.splitlines()]
    assert [(record["prompt"], record["seed"]) for record in records] == [(p, s) for p in ("S", "M", "S1") for s in (0, 1)]
    assert all(record["num_evaluations"] > 0 for record in records)
    lines = whole.splitlines(keepends=True)
    output.write_text("".join(lines[:3]) + lines[3][:10])  # in the middle of a batch
    assert run(capsys, "text", *flags)[0] == 0
    assert output.read_text() == whole
    output.write_text(whole.replace('"S1"', '"S2"'))
    code, _, err = run(capsys, "text", *flags)
    assert code == 2
    assert 'has texts of other prompts or seeds: line 5 is "S2" with seed 0, requested is "S1" with seed 0.' in err
    for foreign in ("{}\n", "my notes, without an end of line", '{"prompt": "S"'[:8] + "x"):
        output.write_text(foreign)
        assert "Line 1 of" in run(capsys, "text", *flags)[2]
        assert output.read_text() == foreign
    output.write_text(whole[:-9])
    code, _, err = run(capsys, "text", *flags, "--sampler", "uniform")
    assert code == 2
    assert 'texts.jsonl holds a run with another `scheduler sampler`: "info_gain" there, "uniform" now.' in err
    assert run(capsys, "text", *flags)[0] == 0
    assert output.read_text() == whole


def test_ends_of_texts_are_flags_and_settings_of_a_run(capsys, tmp_path):
    flags = ["text", "S", "--max-new-tokens", 16, "--device", "cpu", "--output", tmp_path / "t.jsonl"]
    more = ["--stop-strings", "4", "--block-length", 4, "--suppress-tokens", "1", "--think-end-token", "2"]
    more += ["--repetition-penalty", 1.5, "--no-repeat-ngram-size", 3]
    assert run(capsys, *flags, *more)[0] == 0
    (record,) = map(json.loads, (tmp_path / "t.jsonl").read_text().splitlines())
    assert not set(record["text"]) & set("14")
    settings = json.loads((tmp_path / "t.jsonl.run.json").read_text())
    assert settings["stop_strings"] == ["4"]
    assert (settings["suppress_tokens"], settings["think_end_token"]) == (["1"], "2")
    assert (settings["repetition_penalty"], settings["no_repeat_ngram_size"]) == (1.5, 3)
    assert "eos_penalty" not in settings
    code, _, err = run(capsys, *flags[:-2], "--postpone-eos")
    assert code == 2
    assert "`postpone_eos` must be False for a model that has no token for the end of a text, got True." in err
    code, _, err = run(capsys, *flags, "--stop-strings", "3", *more[2:])
    assert code == 2
    assert 'holds a run with another `stop_strings`: ["4"] there, ["3"] now.' in err
    code, out, err = run(capsys, "show", tmp_path / "t.jsonl", "--output", tmp_path, "--device", "cpu")
    assert (code, err) == (0, "")
    assert "Written:" in out


def test_chats_are_laid_out_and_begun_by_flags(capsys, tmp_path):
    template = tmp_path / "t.jinja"
    template.write_text("{% for message in messages %}{{ message.content }}{% endfor %}{% if not add_generation_prompt %}{{ n }}")
    flags = ["text", "S12", "--max-new-tokens", 4, "--device", "cpu", "--output", tmp_path / "t.jsonl"]
    more = ["--chat", "--chat-template", template, "--template-variable", "n=34", "m=False", "--answer-begin", "34"]
    code, _, err = run(capsys, *flags, *more)
    assert code == 2
    assert "`messages`: `chat_template` does not take a chat of the roles user, assistant: " in err
    template.write_text(template.read_text() + "{% endif %}")
    (tmp_path / "t.jsonl.run.json").unlink(missing_ok=True)
    assert run(capsys, *flags, *more)[0] == 0
    (record,) = map(json.loads, (tmp_path / "t.jsonl").read_text().splitlines())
    code, out, _ = run(capsys, "text", "S1234", "--max-new-tokens", 4, "--device", "cpu")
    assert record["text"] == out.strip()
    settings = json.loads((tmp_path / "t.jsonl.run.json").read_text())
    assert settings["chat_template"] == template.read_text()
    assert (settings["chat_template_kwargs"], settings["answer_begin"]) == ({"n": 34, "m": False}, "34")
    code, _, err = run(capsys, *flags, *more[:-1], "12")
    assert code == 2
    assert 'holds a run with another `answer_begin`: "34" there, "12" now.' in err
    code, out, err = run(capsys, "show", tmp_path / "t.jsonl", "--output", tmp_path, "--device", "cpu")
    assert (code, err) == (0, "")
    assert "Written:" in out


def test_guidance_is_a_flag_and_doubles_the_rows(capsys, tmp_path):
    flags = ["text", "S12", "M", "--max-new-tokens", 6, "--device", "cpu", "--sampler", "confidence"]
    flags += ["--tokens-per-step", 1, "--entropy-bound", 0]
    counts = {}
    for scale, more in ((1, []), (1.5, ["--negative-prompt", "S1"])):
        path = tmp_path / f"{scale}.jsonl"
        code, _, err = run(capsys, *flags, "--guidance-scale", scale, *more, "--output", path)
        assert code == 0, err
        counts[scale] = [json.loads(line)["num_evaluations"] for line in path.read_text().splitlines()]
        settings = json.loads(path.with_name(f"{path.name}.run.json").read_text())
        assert (settings.get("guidance_scale"), settings.get("negative_prompt")) == ((1.5, "S1") if more else (None, None))
    assert counts == {1: [6, 6], 1.5: [12, 12]}
    assert run(capsys, "show", tmp_path / "1.5.jsonl", "--output", tmp_path, "--device", "cpu")[::2] == (0, "")
    compared = [*COMPARISON, "--guidance-scale", 1.5, "--repetition-penalty", 1.1, "--output", tmp_path / "out"]
    assert run(capsys, *compared)[0] == 0
    record = json.loads((tmp_path / "out" / "results.jsonl").read_text())
    assert record["num_evaluations"] == [2 * count for count in record["num_states"]]
    samplers = ["confidence", "confidence:guidance_scale=1.5", "confidence:guidance_scale=1"]
    compared = ["compare-text", "--samplers", *samplers, *COMPARISON[1:3], *COMPARISON[5:], "--output", tmp_path / "side"]
    for _ in range(2):  # and go on with what is finished
        code, _, err = run(capsys, *compared)
        assert code == 0, err
    records = [json.loads(line) for line in (tmp_path / "side" / "results.jsonl").read_text().splitlines()]
    ratios = [record["num_evaluations"][0] / record["num_states"][0] for record in records]
    assert ratios == [1, 2, 1]
    assert records[0]["cumulative_entropies"] == records[2]["cumulative_entropies"] != records[1]["cumulative_entropies"]


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--chat-template", "t.jinja"], "--chat-template must be given only with --chat."),
        (["--answer-begin", "a"], "--answer-begin must be given only with --chat."),
        (["--template-variable", "a=1"], "--template-variable must be given only with --chat."),
        (["--chat", "--template-variable", "a=1", "a=2"], "--template-variable must name each variable once."),
        (["--chat", "--template-variable", "a"], "argument --template-variable: must have the form name=value, got 'a'"),
        (["--chat", "--chat-template", "no.jinja"], "no.jinja"),
    ],
)
def test_flags_of_chats_that_do_not_fit_are_named(capsys, flags, text):
    code, _, err = run(capsys, "text", "S", *flags, "--device", "cpu")
    assert code == 2
    assert text in err
    assert len(err.strip().splitlines()) == 1


@pytest.mark.parametrize("mask", ["<mask>", "[MASK]", "<|mdm_mask|>", "<|MASK|>", "[mask]", "{mask}", "< mask >"])
def test_masks_of_other_models_are_refused_where_no_length_is_given(capsys, mask):
    code, _, err = run(capsys, "text", "S12__", f"S12{mask}3", "--device", "cpu")
    assert code == 2
    assert f"Prompt 2 holds {mask!r}, but this model's mask is '_': use that, or give --max-new-tokens" in err
    assert run(capsys, "text", f"S12{mask}3", "--max-new-tokens", 2, "--device", "cpu")[0] == 0


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        ([], "No prompts: give them as arguments"),
        (["S", "--num-texts", "0"], "argument --num-texts: must be an integer >= 1, got 0"),
        (["S", "--max-new-tokens", "400"], "the model takes"),
        (["S", "--model", "no/such"], "'no/such' is neither a folder nor a Hub repository"),
    ],
)
def test_wrong_input_is_one_sentence(capsys, flags, text):
    code, _, err = run(capsys, "text", *flags)
    assert code == 2
    assert text in err
    assert len(err.strip().splitlines()) == 1


def test_a_comparison_writes_a_table_and_runs_only_what_is_missing(capsys, tmp_path):
    flags = ["--tasks", "equation", "sudoku", "--num-problems", 4, "--seeds", 0, "--tokens-per-step", 4, "--device", "cpu"]
    flags += ["--output", tmp_path, "--samplers", "confidence"]
    code, out, _ = run(capsys, "compare-text", *flags)
    assert code == 0
    assert "**equation**" in out
    assert "| 4 | confidence |" in out
    first = (tmp_path / "results.jsonl").read_text()
    assert len(first.splitlines()) == 2
    assert run(capsys, "compare-text", *flags, "paper:gain_reduction=sum")[0] == 0
    second = (tmp_path / "results.jsonl").read_text()
    assert second.startswith(first)
    assert len(second.splitlines()) == 4
    assert "paper:gain_reduction=sum" in (tmp_path / "table.md").read_text()
    assert run(capsys, "compare-text", *flags)[0] == 0
    assert "paper:gain_reduction=sum" not in (tmp_path / "table.md").read_text()
    assert run(capsys, "compare-text", *flags, "--everything")[0] == 0
    assert "paper:gain_reduction=sum" in (tmp_path / "table.md").read_text()
    assert not list(tmp_path.glob("*.png"))
    code, out, _ = run(capsys, "compare-text", *flags, "confidence:token_temperature=0.5", "--plots")
    assert out.endswith(f"Written to {tmp_path}: results.jsonl, table.md, equation.png, sudoku.png.\n")
    assert PIL.Image.open(tmp_path / "equation.png").height == 715


def test_a_folder_of_results_is_of_one_kind_of_runs(capsys, tmp_path):
    flags = ["--tasks", "sudoku", "--num-problems", 2, "--seeds", 0, "--tokens-per-step", 8, "--device", "cpu"]
    flags += ["--output", tmp_path, "--samplers", "confidence"]
    assert run(capsys, "compare-text", *flags)[0] == 0
    code, _, err = run(capsys, "compare-text", *flags, "--problem-seed", 1)
    assert code == 2
    assert "holds a run with another `problem_seed`: 0 there, 1 now." in err
    code, _, err = run(capsys, "compare-text", *flags, "--split", "final")
    assert code == 2
    assert 'holds a run with another `split`: null there, "final" now.' in err


def test_the_same_seeds_of_another_split_are_other_samples(capsys, tmp_path):
    flags = ["--tasks", "equation", "--num-problems", 4, "--seeds", 0, "--tokens-per-step", 8, "--device", "cpu"]
    entropies = []
    for split in ("choose", "report"):
        folder = tmp_path / split
        code, _, err = run(capsys, "compare-text", *flags, "--split", split, "--output", folder, "--samplers", "confidence")
        assert code == 0, err
        entropies.append(json.loads((folder / "results.jsonl").read_text())["cumulative_entropies"])
    assert entropies[0] != entropies[1]


def test_settings_stand_beside_their_own_file(capsys, tmp_path):
    flags = ["text", "S", "--max-new-tokens", 8, "--device", "cpu"]
    files = {temperature: tmp_path / f"run_t{temperature}" for temperature in (0.4, 0.8)}
    for temperature, file in files.items():
        assert run(capsys, *flags, "--token-temperature", temperature, "--output", file)[0] == 0
    for temperature, file in files.items():
        assert run(capsys, *flags, "--token-temperature", temperature, "--output", file)[0] == 0
        code, _, err = run(capsys, *flags, "--token-temperature", 0.5, "--output", file)
        assert code == 2
        assert f"`scheduler token_temperature`: {temperature} there, 0.5 now." in err
    code, _, err = run(capsys, *flags, "--token-temperature", 0.4, "--output", files[0.4], "--chat")
    assert code == 2
    assert "`chat`: false there, true now." in err
    assert run(capsys, *flags, "--token-temperature", 0.4, "--output", files[0.4], "--lookahead-batch-size", 2)[0] == 0


def test_masks_in_prompts_are_all_that_is_written_where_no_length_is_given(capsys):
    code, out, err = run(capsys, "text", "S12__3___________", "--device", "cpu")
    assert (code, err) == (0, "")
    assert len(out.strip()) == 17
    assert run(capsys, "text", "S12", "--device", "cpu")[0] == 0


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (("--num-fewshot", 2), "--num-fewshot must be given only with --ask prompt or chat, got 2 with --ask infill."),
        (("--max-new-tokens", 7), "--max-new-tokens must be given only with --ask prompt or chat, got 7"),
        (("--block-length", 3), "--block-length must be given only with --ask prompt or chat, got 3"),
        (("--stop-strings", "3"), "--stop-strings must be given only with --ask prompt or chat, got ['3'] with --ask infill."),
        (("--negative-prompt", "a"), "--negative-prompt must be given only with --ask prompt or chat, got a"),
        (("--min-new-tokens", 3), "--min-new-tokens must be given only with --ask prompt or chat, got 3"),
        (("--split", "final", "--seeds", 0, 1000), "`seeds` must be from 0 to 999 with the split 'final', got 1000"),
        (("--split", "test"), "argument --split: invalid choice: 'test'"),
        (("--ask", "prompt", "--num-fewshot", -1), "argument --num-fewshot: must be an integer >= 0, got -1"),
        (("--ask", "chat", "--max-new-tokens", 0), "argument --max-new-tokens: must be an integer >= 1, got 0"),
    ],
)
def test_flags_that_would_do_nothing_are_refused(capsys, tmp_path, flags, text):
    code, _, err = run(capsys, "compare-text", *flags, "--output", tmp_path / "out")
    assert code == 2
    assert text in err
    assert not (tmp_path / "out").exists()


def test_finished_runs_of_another_number_of_problems_stay(capsys, tmp_path):
    flags = ["compare-text", "--tasks", "sudoku", "--samplers", "confidence", "--seeds", 0, "--tokens-per-step", 8]
    flags += ["--device", "cpu", "--output", tmp_path]
    assert run(capsys, *flags, "--num-problems", 3)[0] == 0
    finished = (tmp_path / "results.jsonl").read_bytes()
    for count in (2, 4):
        code, _, err = run(capsys, *flags, "--num-problems", count)
        assert code == 2
        assert f"holds a run with another `num_problems`: 3 there, {count} now." in err
    assert (tmp_path / "results.jsonl").read_bytes() == finished


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{cut", "Line 1 of {path} is not JSON: Expecting property name"),
        ("[]", "Line 1 of {path} must hold a JSON object, got list."),
        ("{}", "Line 1 of {path} must have the field `task`."),
        ({"right": 5}, "Line 1 of {path} must have string in its field `right`, got 5."),
        ({"right": "10"}, "Line 1 of {path} must have verdicts and figures of 3 problems."),
        ({"right": "12x"}, "Line 1 of {path} must have verdicts and figures of 3 problems."),
        ({"steps": [1, "x", 2]}, "Line 1 of {path} must have a list of int in its field `steps`"),
        ({"scheduler": {}}, 'holds a run with another `scheduler annealing`: null there, "linear" now.'),
    ],
)
def test_records_that_are_none_are_named(capsys, tmp_path, text, message, finished_comparison):
    for name in ("results.jsonl", "run.json"):
        (tmp_path / name).write_bytes((finished_comparison / name).read_bytes())
    path = tmp_path / "results.jsonl"
    record = json.loads(path.read_text())
    path.write_text(text if isinstance(text, str) else json.dumps(record | text))
    before = path.read_bytes()
    code, _, err = run(capsys, *COMPARISON, "--output", tmp_path)
    assert code == 2
    assert message.format(path=path) in err
    assert path.read_bytes() == before


COMPARISON = ["compare-text", "--tasks", "sudoku", "--samplers", "confidence", "--seeds", 0, "--tokens-per-step", 8]
COMPARISON += ["--num-problems", 3, "--device", "cpu"]


@pytest.fixture(scope="module")
def finished_comparison(tmp_path_factory):
    folder = tmp_path_factory.mktemp("comparison")
    assert cli.main([*map(str, COMPARISON), "--output", str(folder)]) == 0
    return folder


def test_results_without_their_settings_are_not_gone_on_with(capsys, tmp_path, finished_comparison):
    (tmp_path / "results.jsonl").write_bytes((finished_comparison / "results.jsonl").read_bytes())
    code, _, err = run(capsys, *COMPARISON, "--output", tmp_path)
    assert code == 2
    assert f"run.json, which would say how {tmp_path} was made, is missing" in err
    (tmp_path / "run.json").write_text("[]")
    code, _, err = run(capsys, *COMPARISON, "--output", tmp_path)
    assert code == 2
    assert f"{tmp_path / 'run.json'} must hold a JSON object, got list." in err


def test_default_is_what_the_text_pipeline_does(capsys, tmp_path):
    flags = [*COMPARISON, "--output", tmp_path]
    flags[flags.index("confidence")] = "default"
    assert run(capsys, *flags)[0] == 0
    (record,) = map(json.loads, (tmp_path / "results.jsonl").read_text().splitlines())
    own = dict(InfoGainTextPipeline.from_pretrained("demo-text").scheduler.config) | {"tokens_per_step": 8}
    own = json.loads(json.dumps({name: value for name, value in own.items() if not name.startswith("_")}))
    assert own == record["scheduler"]


def test_frequencies_count_by_their_content(capsys, tmp_path):
    frequencies = torch.rand(InfoGainTextPipeline.from_pretrained("demo-text").model.config.vocab_size)
    save_token_frequencies(frequencies, tmp_path / "f.safetensors")
    flags = [*COMPARISON, "--output", tmp_path / "out"]
    flags[flags.index("confidence")] = f"pc_sampler:pc_frequencies={tmp_path / 'f.safetensors'}"
    assert run(capsys, *flags)[0] == 0
    assert run(capsys, *flags)[0] == 0
    save_token_frequencies(frequencies / 2, tmp_path / "f.safetensors")
    code, _, err = run(capsys, *flags)
    assert code == 2
    assert "with another `scheduler pc_frequencies_digest`" in err


def test_a_comparison_asks_in_words(capsys, tmp_path):
    pipe = make_pipe()
    pipe.model.config.max_position_embeddings = 2048
    pipe.tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    pipe.save_pretrained(tmp_path / "model")
    flags = ["--model", tmp_path / "model", "--samplers", "confidence", "--num-problems", 3, "--seeds", 0, "--tokens-per-step", 4]
    flags += ["--max-new-tokens", 8, "--block-length", 4, "--cache", "prefix", "--device", "cpu", "--output", tmp_path / "out"]
    for ask in ("prompt", "chat"):
        code, out, _ = run(capsys, "compare-text", *flags[:-1], tmp_path / ask, "--ask", ask)
        assert code == 0
        for task in choices.TEXT_TASKS:
            assert f"**{task}**" in out
        records = [json.loads(line) for line in (tmp_path / ask / "results.jsonl").read_text().splitlines()]
        assert [record["right"] for record in records] == ["000"] * 4
        assert all(record["num_evaluations"] == [2, 2, 2] for record in records)
    code, _, err = run(capsys, "compare-text", *flags[:-1], tmp_path / "chat", "--ask", "chat", "--num-fewshot", 1)
    assert code == 2
    assert "`shots`: null there, 1 now." in err
    begun = [*flags[:-1], tmp_path / "begun", "--tasks", "sudoku", "--ask", "chat"]
    assert run(capsys, "compare-text", *begun, "--answer-begin", "a cat", "--stop-strings", "dog")[0] == 0
    settings = json.loads((tmp_path / "begun" / "run.json").read_text())
    assert (settings["answer_begin"], settings["stop_strings"]) == ("a cat", ["dog"])
    code, _, err = run(capsys, "compare-text", "--tasks", "countdown")
    assert code == 2
    assert "`ask` must be prompt or chat for the task countdown, which has no template to fill in, got infill." in err


@pytest.mark.parametrize("task", choices.TEXT_TASKS)
@pytest.mark.parametrize("chat", [True, False])
def test_replies_are_read_behind_the_last_answer(task, chat):
    problems = text_comparison.problems_of(task, 2)

    def pipe(generator, prompt=None, messages=None, **call):
        asked = [chat[0]["content"] for chat in messages] if prompt is None else prompt
        assert (prompt is None) == chat
        assert all(problem.question in one for problem, one in zip(problems, asked, strict=True))
        assert [one.count("Answer:") for one in asked] == [2, 2]
        assert call == {"max_new_tokens": 9}
        assert [one.initial_seed() for one in generator] == [5, 6]
        first = f"Answer: no, wait. Answer: {problems[0].solution}\nAs you see."
        texts = [first if chat else f" {problems[0].solution}\n\n{problems[1].question} 1", problems[1].solution + "0"]
        return types.SimpleNamespace(texts=texts, trace=None)

    answers, _ = text_comparison.reply(pipe, problems, [5, 6], chat=chat, shots=1, max_new_tokens=9)
    assert [problem.check(answer) for problem, answer in zip(problems, answers, strict=True)] == [True, False]


def test_the_embedded_model_says_what_it_knows(capsys):
    code, _, err = run(capsys, "text", "Write a haiku.", "--device", "cpu")
    assert code == 0
    assert err.startswith("demo-text, the embedded model, knows 4x4 Sudoku grids")
    assert len(err.splitlines()) == 1
    assert run(capsys, "text", "S", "--device", "cpu")[2] == ""
