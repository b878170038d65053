"""lm-eval's tasks that compare likelihoods, on a tiny text pipeline."""

from __future__ import annotations

import functools
import json
import threading
import time
from pathlib import Path

import pytest
import torch
from helpers.text_pipelines import EOS, MASK, make_block_pipe, make_pipe
from safetensors.torch import load_file

from diffusers_infogain import PRESETS, InfoGainScheduler, cli
from diffusers_infogain.evaluation.lm_eval_likelihood import LikelihoodSettings
from diffusers_infogain.evaluation.text_cache import EstimateCache
from diffusers_infogain.pipeline_infogain_text import InfoGainTextPipeline
from diffusers_infogain.processes import Processes

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install -e '.[lm-eval]'")

from diffusers_infogain.evaluation.lm_eval_adapter import InfoGainLM

GOLDEN = Path(__file__).parents[1] / "golden"
PAIRS = [("a red cat", " on the mat"), ("dogs", " fog"), ("the mat on", " fog cat"), ("a red cat", " dogs")]
FEW = LikelihoodSettings(num_draws=16, group_size=4)


def requests_of(pairs):
    from lm_eval.api.instance import Instance

    return [Instance("loglikelihood", {}, pair, number, metadata=("t", number, 1)) for number, pair in enumerate(pairs)]


@pytest.mark.parametrize("make", [make_pipe, make_block_pipe])
def test_an_estimate_is_the_pipelines_whatever_its_batch(make):
    found = {}
    for size in (1, 3):
        model = InfoGainLM(make(), batch_size=size, likelihood=FEW)
        found[size] = model.loglikelihood(requests_of(PAIRS), disable_tqdm=True)
        seeds = {cost["doc_id"]: cost["seed"] for cost in model.costs}
    pipe = make()
    for number, (prompt, answer) in enumerate(PAIRS):
        generators = [torch.Generator().manual_seed(seeds[number])]
        output = pipe.log_likelihood(prompt, answer, num_draws=16, group_size=4, check_greedy=True, generator=generators)
        for size in (1, 3):
            assert found[size][number] == (pytest.approx(output.log_likelihood.item(), abs=1e-6), output.is_greedy.item())
    other = InfoGainLM(make(), seed=1, likelihood=FEW).loglikelihood(requests_of(PAIRS), disable_tqdm=True)
    assert [value for value, _ in other] != [value for value, _ in found[1]]


def test_what_is_kept_is_not_estimated_again(tmp_path):
    path = tmp_path / "likelihoods.jsonl"
    model = InfoGainLM(make_pipe(), batch_size=3, likelihood=FEW, estimates=EstimateCache(path))
    whole = model.loglikelihood(requests_of(PAIRS), disable_tqdm=True)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:3]) + lines[3][:25])
    again = InfoGainLM(make_pipe(), batch_size=3, likelihood=FEW, estimates=EstimateCache(path))
    assert again.loglikelihood(requests_of(PAIRS), disable_tqdm=True) == whole
    assert again.totals["num_texts"] == 1
    assert len(path.read_text().splitlines()) == 4


def test_ends_and_starts_of_answers():
    pipe = make_pipe()
    plain = InfoGainLM(pipe, likelihood=FEW)._answer("a red", " cat")
    starting = InfoGainLM(pipe, likelihood=FEW, add_bos_token=True)._answer("a red", " cat")
    assert starting.prompt == [pipe.tokenizer.bos_token_id, *plain.prompt]
    assert InfoGainLM(pipe, add_bos_token=True).encode("a red") == starting.prompt
    ended = InfoGainLM(pipe, likelihood=LikelihoodSettings(append_eos=True))._answer("a red", " cat")
    assert (ended.tokens, ended.end) == ([*plain.tokens, EOS], ())
    seen = InfoGainLM(pipe, likelihood=LikelihoodSettings("dream", append_eos=True))._answer("a red", " cat")
    assert (seen.tokens, seen.end) == (plain.tokens, (EOS,))


def test_the_likelihood_of_a_long_text_is_that_of_its_windows():
    from lm_eval.api.instance import Instance

    pipe = make_pipe()
    settings = LikelihoodSettings("left_to_right")
    model = InfoGainLM(pipe, batch_size=4, likelihood=settings)
    words = " ".join(["a red cat on the mat"] * 12)
    ids = pipe.tokenizer(words).input_ids
    assert 64 < len(ids) < 126
    (found,) = model.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (words,), 0)], disable_tqdm=True)
    first, second = ids[:63], ids[63:]
    context = ids[len(ids) - 64 : 63]
    output = pipe.log_likelihood(
        input_ids=[[pipe.tokenizer.bos_token_id], context], answer_ids=[first, second], likelihood="left_to_right"
    )
    assert found == pytest.approx(output.log_likelihood.sum().item(), abs=1e-4)


TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
output_type: {kind}
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: {target}
{more}
metric_list:
{metrics}
"""
ACCURACY = """  - metric: acc
    aggregation: mean
    higher_is_better: true
  - metric: acc_norm
    aggregation: mean
    higher_is_better: true"""
PERPLEXITY = """  - metric: word_perplexity"""
QUESTIONS = [("a red", "cat mat", "fog"), ("the", "mat", "dogs on fog"), ("cat on", "a", "the mat")]


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs the command on tiny tasks in the layouts of ARC and MMLU, of LAMBADA, and of WikiText."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    import datasets
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    rows = [
        {"question": q, "choices": {"text": [one, two], "label": ["A", "B"]}, "answerKey": "B", "options": ["A", "B"], "gold": 1}
        for q, one, two in QUESTIONS
    ]
    data = tmp_path / "data.json"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = tmp_path / "tasks"
    folder.mkdir()

    def write(name: str, kind: str, target: str, more: str = "", metrics: str = ACCURACY) -> None:
        text = TASK.format(name=name, data=data, kind=kind, target=target, more=more, metrics=metrics)
        (folder / f"{name}.yaml").write_text(text)

    write("tiny_arc", "multiple_choice", '"{{choices.label.index(answerKey)}}"', 'doc_to_choice: "{{choices.text}}"')
    write("tiny_mmlu", "multiple_choice", "gold", 'doc_to_choice: ["A", "B"]')
    write("tiny_lambada", "loglikelihood", '" {{choices.text[0]}}"', metrics="  - metric: acc")
    write("tiny_wiki", "loglikelihood_rolling", '"{{question}} {{choices.text[1]}}"', metrics=PERPLEXITY)
    monkeypatch.setattr("lm_eval.tasks.TaskManager", functools.partial(TaskManager, include_defaults=False))
    monkeypatch.setattr(InfoGainTextPipeline, "from_pretrained", lambda *_, **__: make_pipe(sampler="confidence"))

    def command(*flags: object) -> tuple[dict, str, Path]:
        output = tmp_path / "out"
        words = ["lm-eval", "--model", "tiny", "--include-path", folder, "--output", output, "--device", "cpu", *flags]
        code = cli.main([str(word) for word in words])
        captured = capsys.readouterr()
        assert code == 0, captured.err
        return json.loads((output / "results.json").read_text()), captured.out, output

    return command


def test_tasks_that_compare_likelihoods_run_and_go_on(run):
    tasks = ("--tasks", "tiny_arc", "tiny_mmlu", "tiny_lambada", "tiny_wiki", "--num-draws", 16)
    results, out, output = run(*tasks)
    model = InfoGainLM(make_pipe(), likelihood=LikelihoodSettings(num_draws=16))
    pairs = [(q, f" {choice}") for q, *choices in QUESTIONS for choice in choices]
    values = [value for value, _ in model.loglikelihood(requests_of(pairs), disable_tqdm=True)]
    right = [values[2 * number + 1] > values[2 * number] for number in range(3)]
    assert results["results"]["tiny_arc"]["acc,none"] == pytest.approx(sum(right) / 3)
    assert {"acc_norm,none", "acc,none"} <= set(results["results"]["tiny_mmlu"])
    greedy = [model.loglikelihood(requests_of([(q, f" {one}")]), disable_tqdm=True)[0][1] for q, one, _ in QUESTIONS]
    assert results["results"]["tiny_lambada"]["acc,none"] == pytest.approx(sum(greedy) / 3)
    assert results["results"]["tiny_wiki"]["word_perplexity,none"] > 1
    assert "tiny_arc: 6 texts" in out
    assert results["config"]["infogain"]["likelihood"]["num_draws"] == 16
    (kept,) = output.glob("likelihoods_*.jsonl")
    before = kept.read_text()
    kept.write_text("".join(before.splitlines(keepends=True)[:5]))
    again, _, _ = run(*tasks)
    assert again["results"] == results["results"]
    assert sorted(line[:80] for line in kept.read_text().splitlines()) == sorted(line[:80] for line in before.splitlines())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "exact"}, "`likelihood` must be one of llada, dream, left_to_right, right_to_left, got 'exact'"),
        ({"num_draws": 9}, "`num_draws` must be a multiple of `group_size` = 8, got 9"),
        ({"append_eos": 1}, "`append_eos` must be True or False, got 1"),
    ],
)
def test_settings_that_do_not_fit_are_named(settings, message):
    with pytest.raises(ValueError) as error:
        LikelihoodSettings(**settings)
    assert message in str(error.value)


def test_answers_behind_the_thinking_are_read():
    pipe = make_pipe()
    tokenizer = pipe.tokenizer
    model = InfoGainLM(pipe, think_end_token="<|startoftext|>")
    ids = tokenizer("a red cat").input_ids
    end = tokenizer.bos_token_id
    assert model._text([*ids, end, *ids], ()) == "a red cat"
    assert model._text([*ids, end, *ids], ("red",)) == "a "
    assert model._text([*ids, *ids], ("cat",)) == "a red "
    assert InfoGainLM(pipe, stop_at_eos=False)._text([*ids, EOS, *ids], ()) == "a red cat a red cat"


def test_processes_share_texts_and_estimates():
    store, served, pipes = torch.distributed.HashStore(), [], [make_pipe(), make_pipe()]
    alone = InfoGainLM(make_pipe(), batch_size=1, likelihood=FEW)
    expected = alone.loglikelihood(requests_of(PAIRS), disable_tqdm=True)
    given = {"until": [], "max_gen_toks": 4, "do_sample": False}
    texts = alone.generate_until(requests_of([(prompt, given) for prompt, _ in PAIRS]), disable_tqdm=True)

    def serve() -> None:
        model = InfoGainLM(pipes[1], batch_size=1, likelihood=FEW, processes=Processes(1, 2, store))
        estimate, model._estimate = model._estimate, lambda jobs: served.append(len(jobs)) or estimate(jobs)
        model.serve()

    thread = threading.Thread(target=serve)
    thread.start()
    model = InfoGainLM(pipes[0], batch_size=1, likelihood=FEW, processes=Processes(0, 2, store))
    estimate = model._estimate
    model._estimate = lambda jobs: (time.sleep(0.2), estimate(jobs))[1]  # so that the other one takes some
    found = model.loglikelihood(requests_of(PAIRS), disable_tqdm=True)
    written = model.generate_until(requests_of([(prompt, given) for prompt, _ in PAIRS]), disable_tqdm=True)
    model.done()
    thread.join(30)
    assert not thread.is_alive()
    assert found == expected
    assert written == texts
    assert served


def test_published_settings_give_the_published_tokens():
    """The texts of lm-eval are those that LLaDA's loop wrote for the same prompts, lengths, steps and blocks."""
    pipe = make_pipe()
    weights = load_file(GOLDEN / "published_loops.safetensors")
    pipe.model.load_state_dict({key.removeprefix("full."): value for key, value in weights.items() if key.startswith("full.")})
    pipe.scheduler = InfoGainScheduler(MASK, **PRESETS["llada"])
    cases = [case for case in json.loads((GOLDEN / "published_loops.json").read_text()) if case["family"] == "llada"]
    cases = [case for case in cases if not case["changes"]]
    assert len(cases) == 8
    for case in cases:
        prompt = pipe.tokenizer.decode(case["prompt"])
        steps = {name: case[name] for name in ("num_inference_steps", "block_length")}
        model = InfoGainLM(pipe, max_gen_toks=case["max_new_tokens"], stop_at_eos=False, **steps, **case.get("call", {}))
        assert model.encode(prompt) == case["prompt"]
        expected = pipe.tokenizer.decode(case["tokens"][len(case["prompt"]) :], skip_special_tokens=True)
        assert model.generate_until(requests_of([(prompt, {"until": []})]), disable_tqdm=True) == [expected]
        stop = expected.split()[3]
        cut = model.generate_until(requests_of([(prompt, {"until": [stop]})]), disable_tqdm=True)
        assert cut == [expected[: expected.index(stop)]]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--chat-template", "x.jinja"), "--chat-template must be given only with --chat."),
        (("--template-variable", "a=1"), "--template-variable must be given only with --chat."),
        (("--chat", "--template-variable", "a=1", "a=2"), "--template-variable must name each variable once."),
    ],
)
def test_flags_of_chats_are_checked(capsys, flags, message):
    assert cli.main(["lm-eval", "--model", "tiny", "--tasks", "x", *flags]) == 2
    assert message in capsys.readouterr().err
