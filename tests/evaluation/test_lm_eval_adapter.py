"""lm-eval's requests and tasks on a tiny text pipeline; all but the first tests need lm-eval."""

from __future__ import annotations

import functools
import json
import pickle
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_pipeline_infogain_text import EOS, MASK, ending_pipe, make_pipe

from diffusers_infogain import InfoGainScheduler, cli
from diffusers_infogain.evaluation.lm_eval_tasks import check_tasks
from diffusers_infogain.pipeline_infogain_text import InfoGainTextPipeline

ROOT = Path(__file__).parents[2]
PROMPTS = ["a red cat", "dogs", "the mat on fog", "cat", "fog on a mat"]
GREEDY = {"until": [], "max_gen_toks": 6, "do_sample": False, "temperature": 0.0}


def test_without_lm_eval_the_error_names_the_extra_and_all_other_commands_work(tmp_path):
    code = f"""
import importlib.abc, sys
class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "lm_eval":
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Block())
try:
    import diffusers_infogain.evaluation.lm_eval_adapter
except ModuleNotFoundError as error:
    print(error.name, error)
from diffusers_infogain import cli
cli.build_parser()
sys.exit(cli.main(["lm-eval", "--model", "x", "--tasks", "gsm8k", "--output", {str(tmp_path / "out")!r}]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.startswith("lm_eval lm-eval's tasks need lm-eval")
    assert "pip install -e '.[lm-eval]'" in done.stdout
    assert done.returncode == 2
    assert "pip install -e '.[lm-eval]'" in done.stderr.strip().splitlines()[-1]
    assert not (tmp_path / "out").exists()


@pytest.fixture
def adapter():
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install -e '.[lm-eval]'")
    from diffusers_infogain.evaluation import lm_eval_adapter

    return lm_eval_adapter


def requests_of(prompts, given=GREEDY, repeats=1):
    from lm_eval.api.instance import Instance

    every = [
        Instance("generate_until", {}, (prompt, dict(given)), 0, metadata=("t", i, repeats)) for i, prompt in enumerate(prompts)
    ]
    return [one for one in every for _ in range(repeats)]


def test_a_text_is_the_same_alone_in_any_batch_and_order(adapter):
    settings = {"num_inference_steps": 3, "block_length": 3}
    texts = {}
    for size in (1, 2, 5):
        model = adapter.InfoGainLM(make_pipe(sampler="info_gain"), batch_size=size, **settings)
        texts[size] = model.generate_until(requests_of(PROMPTS), disable_tqdm=True)
    assert texts[1] == texts[2] == texts[5]
    model = adapter.InfoGainLM(make_pipe(sampler="info_gain"), batch_size=2, **settings)
    assert model.generate_until(requests_of(PROMPTS[::-1]), disable_tqdm=True) == texts[1][::-1]
    other = adapter.InfoGainLM(make_pipe(sampler="info_gain"), seed=1, **settings)
    assert other.generate_until(requests_of(PROMPTS), disable_tqdm=True) != texts[1]


def test_a_text_is_the_pipelines_with_the_requests_seed(adapter):
    pipe = make_pipe(sampler="info_gain")
    model = adapter.InfoGainLM(pipe, batch_size=3)
    texts = model.generate_until(requests_of(PROMPTS), disable_tqdm=True)
    for prompt, text, cost in zip(PROMPTS, texts, sorted(model.costs, key=lambda cost: cost["doc_id"]), strict=True):
        generators = [torch.Generator().manual_seed(adapter.request_seed(0, prompt, 0))]
        output = pipe(prompt, max_new_tokens=6, generator=generators)
        assert text == output.texts[0]
        assert cost["num_evaluations"] == output.trace.num_evaluations.sum()
        assert cost["cumulative_entropy"] == pytest.approx(output.trace.cumulative_entropy.item(), rel=1e-4)
        assert cost["seed"] == adapter.request_seed(0, prompt, 0)
    assert model.totals["num_texts"] == 5
    assert model.totals["num_evaluations"] == sum(cost["num_evaluations"] for cost in model.costs)
    assert model.totals["seconds"] > 0
    info = json.loads(json.dumps(model.get_model_info()))["infogain"]
    assert info["num_evaluations"] == model.totals["num_evaluations"]
    assert info["scheduler"]["sampler"] == "info_gain"


def test_repeats_of_sampled_requests_differ_and_others_do_not(adapter):
    model = adapter.InfoGainLM(make_pipe(sampler="confidence"), batch_size=3)
    sampled = {**GREEDY, "do_sample": True, "temperature": 2.0}
    texts = model.generate_until(requests_of(["a cat"], sampled, repeats=4), disable_tqdm=True)
    assert len(set(texts)) > 1
    assert [cost["repeat"] for cost in model.costs] == [0, 1, 2, 3]
    assert len(set(model.generate_until(requests_of(["a cat"], GREEDY, repeats=4), disable_tqdm=True))) == 1


def test_a_request_sets_the_temperature_for_itself_only(adapter):
    pipe = make_pipe(sampler="confidence", token_temperature=0.8)
    seen = []

    class Watched(adapter.InfoGainLM):
        def _batch(self, jobs):
            seen.append((jobs[0]["length"], jobs[0]["scheduler"]))
            return super()._batch(jobs)

    sampled = {"max_gen_toks": 4, "do_sample": True, "temperature": 0.5, "top_k": 3, "top_p": 1.0}
    model = Watched(pipe)
    texts = model.generate_until(requests_of(["a cat"], GREEDY) + requests_of(["a cat"], sampled), disable_tqdm=True)
    assert seen == [(6, {}), (4, {"token_temperature": 0.5, "top_k": 3, "top_p": 1.0})]
    assert pipe.scheduler.config.token_temperature == 0.8
    assert all(len(text.split()) <= most for text, most in zip(texts, (6, 4), strict=True))
    greedy = Watched(pipe, greedy_tokens=True)
    text = greedy.generate_until(requests_of(["a cat"], GREEDY), disable_tqdm=True)[0]
    assert seen[-1] == (6, {"token_temperature": 0.0})
    pipe.scheduler = InfoGainScheduler.from_config(pipe.scheduler.config, token_temperature=0.0)
    seeds = [torch.Generator().manual_seed(adapter.request_seed(0, "a cat", 0))]
    assert pipe("a cat", max_new_tokens=6, generator=seeds).texts == [text]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, ((), 256, False, ())),
        ({"until": "x", "max_gen_toks": 3}, (("x",), 3, False, ())),
        ({"until": ["x", ""], "max_new_tokens": 3}, (("x",), 3, False, ())),
        ({"max_tokens": 3, "max_completion_tokens": 3}, ((), 3, False, ())),
        ({"temperature": 0.0, "top_p": 0.9}, ((), 256, False, ())),
        ({"do_sample": False, "temperature": 0.7}, ((), 256, False, ())),
        ({"temperature": 0.7}, ((), 256, True, (("token_temperature", 0.7),))),
        ({"do_sample": True}, ((), 256, True, ())),
        ({"do_sample": True, "top_p": 0.9, "top_k": 0}, ((), 256, True, (("top_k", None), ("top_p", 0.9)))),
    ],
)
def test_settings_of_requests(adapter, given, expected):
    assert adapter.generation_settings(given, 256) == adapter.GenerationSettings(*expected)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"num_beams": 4}, "The generation setting `num_beams` = 4 is not supported, only until, max_gen_toks"),
        ({"repetition_penalty": 1.2}, "`repetition_penalty` = 1.2 is not supported"),
        ({"until": [3]}, "`until` must be a string or a list of strings, got [3]"),
        ({"max_gen_toks": 0}, "`max_gen_toks` must be an integer >= 1, got 0"),
        ({"max_new_tokens": "8"}, "`max_new_tokens` must be an integer >= 1, got '8'"),
        ({"max_gen_toks": 3, "max_tokens": 4}, "`max_gen_toks` and `max_tokens` must be the same number, got 3, 4"),
        ({"temperature": -1.0}, "`temperature` must be a number >= 0, got -1.0"),
        ({"do_sample": True, "temperature": 0.0}, "`temperature` must be above 0 with `do_sample` = True, got 0"),
        ({"do_sample": "yes"}, "`do_sample` must be True, False or None, got 'yes'"),
        ({"do_sample": True, "top_p": 3.0, "max_gen_toks": 3}, "`top_p` must be"),
        ({"max_gen_toks": 70}, "The longest prompt and `max_new_tokens` = 70 make"),
    ],
)
def test_settings_that_are_not_honoured_are_named(adapter, given, text):
    with pytest.raises(ValueError) as error:
        adapter.InfoGainLM(make_pipe()).generate_until(requests_of(["a cat"], given), disable_tqdm=True)
    assert text in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"batch_size": 0}, "`batch_size` must be an integer >= 1, got 0"),
        ({"max_gen_toks": 0}, "`max_gen_toks` must be an integer >= 1, got 0"),
        ({"generator": 1}, "`generator` must be one of block_length, num_inference_steps"),
        ({"pipe": "model"}, "`pipe` must be an InfoGainTextPipeline, got str"),
    ],
)
def test_arguments_that_do_not_fit_are_named(adapter, arguments, text):
    with pytest.raises(ValueError) as error:
        adapter.InfoGainLM(**{"pipe": make_pipe(), **arguments})
    assert text in str(error.value)


def test_until_and_the_end_cut_the_text(adapter):
    pipe = ending_pipe(place=4)
    pipe.set_progress_bar_config(disable=True)
    model = adapter.InfoGainLM(pipe)
    # rows have 3 and 1 tokens of prompt: the ends are the second and the fourth new token
    assert model.generate_until(requests_of(["a red cat", "dogs"]), disable_tqdm=True) == ["on", "on on on"]
    cut = {**GREEDY, "until": ["n on on", " on"]}
    assert model.generate_until(requests_of(["a red cat", "dogs"], cut), disable_tqdm=True) == [
        "on",
        "on",
    ]  # the first that is complete
    assert model._text([3, 3, 20, 3], ("<|startoftext|>",)) == "on on"
    assert model._text([3, EOS, 3], ()) == "on"
    assert model._text([3, 3], ("nowhere",)) == "on on"


def test_prompts(adapter):
    pipe = make_pipe()
    model = adapter.InfoGainLM(pipe)
    assert model.encode("a red cat") == pipe.tokenizer("a red cat").input_ids
    with pytest.raises(ValueError, match="A prompt must not have the model's mask token"):
        model.encode(pipe.tokenizer.convert_ids_to_tokens(MASK))
    with pytest.raises(ValueError, match="A prompt must have at least one token, got ''"):
        model.encode("")


def test_chats_get_their_special_tokens_once(adapter):
    from tokenizers.processors import TemplateProcessing

    pipe = make_pipe()
    tokenizer = pipe.tokenizer
    model = adapter.InfoGainLM(pipe)
    chat = [{"role": "user", "content": "a red cat"}]
    with pytest.raises(ValueError, match="chat_template"):
        model.apply_chat_template(chat)
    start = ("<|startoftext|>", tokenizer.bos_token_id)
    tokenizer._tokenizer.post_processor = TemplateProcessing(single=f"{start[0]} $A", special_tokens=[start])
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}{% if add_generation_prompt %}fog{% endif %}"
    text = model.apply_chat_template(chat)
    assert text == "a red cat fog"
    assert model.encode(text) == pipe.encode(messages=chat)[0]
    assert model.encode("a red") == [tokenizer.bos_token_id, *model.encode("<|startoftext|> a red")[1:]]
    assert model.chat_template(True) == tokenizer.chat_template
    assert model.chat_template(False) is None
    assert model.tokenizer_name
    tokenizer.chat_template = "{{ raise_exception('no system') }}"
    with pytest.raises(ValueError, match="does not take a chat of the roles user: no system"):
        model.apply_chat_template(chat)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    begun = [*chat, {"role": "assistant", "content": "the mat"}]
    assert model.apply_chat_template(begun, add_generation_prompt=False) == "a red cat the mat"


def test_repeats_that_a_cache_would_confuse_are_refused(adapter):
    model = adapter.InfoGainLM(make_pipe())
    given = {"until": [], "max_gen_toks": 4, "temperature": 1.0}
    assert len(model.generate_until(requests_of(PROMPTS[:2], given), disable_tqdm=True)) == 2
    with pytest.raises(ValueError, match="`do_sample` must be true in requests that are sampled more than once, got none"):
        model.generate_until(requests_of(PROMPTS[:1], given, repeats=2), disable_tqdm=True)


TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
output_type: {kind}
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
generation_kwargs:
  until: ["{until}"]
  max_gen_toks: 6
  do_sample: false
{more}
"""


@pytest.fixture
def tasks(adapter, tmp_path, monkeypatch) -> Path:
    """A folder of tasks whose right answer is the first word that the model writes."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    import datasets
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    model = adapter.InfoGainLM(make_pipe(sampler="confidence"))
    answers = model.generate_until(requests_of(PROMPTS, {**GREEDY, "until": [" "]}), disable_tqdm=True)
    rows = [{"question": prompt, "answer": answer} for prompt, answer in zip(PROMPTS, answers, strict=True)]
    rows[-1]["answer"] = "something else"
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "data.json").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def write(name: str, kind: str = "generate_until", until: str = " ", more: str = "") -> None:
        text = TASK.format(name=name, data=folder / "data.json", kind=kind, until=until, more=more)
        (folder / f"{name}.yaml").write_text(text)

    write("tiny_words")
    write("tiny_code", more="unsafe_code: true")
    (folder / "group.yaml").write_text("group: tiny_group\ntask: [tiny_words, tiny_code]\n")
    # lm-eval's own tasks take it seconds to list
    monkeypatch.setattr("lm_eval.tasks.TaskManager", functools.partial(TaskManager, include_defaults=False))
    monkeypatch.setattr(InfoGainTextPipeline, "from_pretrained", lambda *_, **__: make_pipe(sampler="confidence"))
    return folder


def command(capsys, tasks: Path, *names: str, flags: tuple = ()) -> tuple[int, str, str]:
    output = tasks.parent / "out"
    words = [
        "lm-eval",
        "--model",
        "tiny",
        "--tasks",
        *names,
        "--include-path",
        tasks,
        "--output",
        output,
        "--device",
        "cpu",
        "--batch-size",
        2,
    ]
    code = cli.main([str(word) for word in (*words, *flags)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_command_writes_scores_samples_and_costs_and_goes_on(capsys, tasks):
    code, out, err = command(capsys, tasks, "tiny_words")
    assert code == 0, err
    output = tasks.parent / "out"
    results = json.loads((output / "results.json").read_text())
    assert results["results"]["tiny_words"]["exact_match,none"] == pytest.approx(4 / 5)
    cost = results["infogain"]["costs"]["tiny_words"]
    assert cost["num_texts"] == 5
    assert cost["num_evaluations"] == 5 * 6
    assert results["config"]["infogain"]["scheduler"]["sampler"] == "confidence"
    assert len((output / "samples_tiny_words.jsonl").read_text().splitlines()) == 5
    assert "tiny_words: 5 texts, 30 NFE" in out
    # a killed run: two texts are missing, and a last line is cut off
    (texts,) = output.glob("texts_*.jsonl")
    whole = texts.read_text()
    lines = whole.splitlines(keepends=True)
    texts.write_text("".join(lines[:3]) + lines[3][:20])
    assert command(capsys, tasks, "tiny_words")[0] == 0
    again = json.loads((output / "results.json").read_text())
    assert again["results"]["tiny_words"]["exact_match,none"] == pytest.approx(4 / 5)
    assert again["config"]["infogain"]["num_texts"] == 2
    assert again["infogain"]["costs"]["tiny_words"]["num_texts"] == 5
    assert [json.loads(line)["text"] for line in texts.read_text().splitlines()] == [json.loads(line)["text"] for line in lines]
    # other settings and fewer problems are kept beside them
    assert command(capsys, tasks, "tiny_words", flags=("--seed", 1, "--limit", 2))[0] == 0
    assert len(list(output.glob("texts_*.jsonl"))) == 2
    assert json.loads((output / "results-2.json").read_text())["config"]["infogain"]["num_texts"] == 2
    assert command(capsys, tasks, "tiny_words", flags=("--limit", 2))[0] == 0
    fewer = json.loads((output / "results-3.json").read_text())["infogain"]["costs"]["tiny_words"]
    assert (fewer["num_texts"], fewer["num_evaluations"]) == (2, 12)
    assert len((output / "samples_tiny_words-3.jsonl").read_text().splitlines()) == 2
    assert json.loads((output / "results.json").read_text()) == again


def test_what_a_folder_holds_is_never_run(capsys, tasks):
    """lm-eval's own cache is a database of pickles."""

    class Evil:
        def __reduce__(self):
            return exec, ("raise SystemExit('the cache ran code')",)

    assert command(capsys, tasks, "tiny_words")[0] == 0
    output = tasks.parent / "out"
    (texts,) = output.glob("texts_*.jsonl")
    digest = texts.stem.removeprefix("texts_")
    for name in (f"cache_{digest}.db", f"cache_{digest}_rank0.db"):
        base = sqlite3.connect(output / name)
        with base:
            base.execute("CREATE TABLE unnamed (key TEXT PRIMARY KEY, value BLOB)")
            from lm_eval.api.model import hash_args

            keys = [hash_args("generate_until", (prompt, {**GREEDY, "until": [" "]})) for prompt in PROMPTS]
            base.executemany("INSERT INTO unnamed VALUES (?, ?)", [(key, pickle.dumps(Evil())) for key in keys])
        base.close()
    assert command(capsys, tasks, "tiny_words")[0] == 0
    texts.write_bytes(pickle.dumps(Evil()))
    code, _, err = command(capsys, tasks, "tiny_words")
    assert code == 2
    assert f"{texts} is not UTF-8 text" in err
    for line, message in [
        ("5", "Line 1 of {} must hold a JSON object, got int."),
        ('{"key": 5}', "Line 1 of {} must have string in its field `key`, got 5."),
        ("notes", "Line 1 of {} is not JSON"),
    ]:
        texts.write_text(line + "\n")
        code, _, err = command(capsys, tasks, "tiny_words")
        assert code == 2
        assert message.format(texts) in err


def test_generated_programs_run_only_where_that_is_allowed(capsys, tasks, monkeypatch):
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")  # not enough
    for name in ("tiny_code", "tiny_group"):
        code, _, err = command(capsys, tasks, name)
        assert code == 2
        last = err.strip().splitlines()[-1]
        assert "The task tiny_code runs programs that the model writes" in last
        assert "--allow-code-execution" in last
    assert not (tasks.parent / "out").exists()
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "0")
    assert command(capsys, tasks, "tiny_code", flags=("--allow-code-execution",))[0] == 0


def test_humaneval_and_mbpp_are_known_as_such_before_anything_of_theirs_is_loaded(adapter):
    import lm_eval.tasks

    home = Path(lm_eval.tasks.__file__).parent  # of which all tasks take seven seconds to read
    families = ("humaneval", "mbpp", "gsm8k", "minerva_math", "ifeval", "hendrycks_math", "mmlu")
    manager = lm_eval.tasks.TaskManager(include_path=[home / name for name in families], include_defaults=False)
    index = manager.task_index
    for name in ("humaneval", "humaneval_instruct", "humaneval_64", "humaneval_plus", "mbpp", "mbpp_instruct", "mbpp_plus"):
        with pytest.raises(ValueError, match=f"The task {name} runs programs"):
            check_tasks(index, [name])
        check_tasks(index, [name], allow_code_execution=True)
    check_tasks(index, ["gsm8k", "minerva_math500", "ifeval", "hendrycks_math", "mmlu"])


@pytest.mark.parametrize(
    ("name", "flags", "text"),
    [
        ("no_such", (), "`tasks` must be names of tasks, groups or tags of lm-eval (lm-eval ls tasks), got 'no_such'"),
        ("tiny_words", ("--gen-kwargs", "num_beams=4"), "The generation setting `num_beams` = 4 is not supported"),
        ("tiny_words", ("--chat",), "chat_template"),
    ],
)
def test_wrong_input_is_one_sentence(capsys, tasks, name, flags, text):
    code, _, err = command(capsys, tasks, name, flags=flags)
    assert code == 2
    assert text in err.strip().splitlines()[-1]


def test_a_limit_of_nothing_is_refused_at_once(capsys):
    with pytest.raises(SystemExit):
        cli.main(["lm-eval", "--model", "tiny", "--tasks", "tiny_words", "--limit", "0"])
    assert "argument --limit: must be an integer >= 1, got 0" in capsys.readouterr().err


def test_the_example_of_the_documentation_runs(tasks, capsys):
    from lm_eval.tasks import TaskManager

    page = (ROOT / "docs" / "lm_eval.md").read_text(encoding="utf-8")
    code = (
        page.partition("```python\n")[2].partition("```")[0].replace('"cuda"', '"cpu"').replace("torch.bfloat16", "torch.float32")
    )
    own = 'tasks=["gsm8k"], limit=100, apply_chat_template=True'
    assert own in code
    code = code.replace(own, 'tasks=["tiny_words"], limit=2, task_manager=manager')
    exec(code, {"manager": TaskManager(include_path=str(tasks))})
    assert capsys.readouterr().out.startswith("{'num_texts': 2, 'num_evaluations': 12, ")
