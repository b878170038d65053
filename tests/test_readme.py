"""Examples in the documentation run as they stand."""

from __future__ import annotations

import re
import shlex
import textwrap
from pathlib import Path
from unittest import mock

import pytest
import torch
from helpers.checkpoints import make_lumina_pipeline, make_mmada_pipeline, make_showo_pipeline

from diffusers_infogain import InfoGainScheduler, InfoGainTextPipeline, cli, rules
from diffusers_infogain.evaluation.text_tasks import check_grid

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")))
NOT_RUN = {
    "docs/lm_eval.md",  # needs a checkpoint and data; tests/evaluation/test_lm_eval_adapter.py runs the same calls
    "docs/memory.md",  # needs checkpoints and GPUs; tests/test_placement.py runs the same calls
}


def blocks(text: str, language: str) -> list[str]:
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```", text, flags=re.DOTALL | re.MULTILINE)
    return [textwrap.dedent(block) for _, block in found]


def page_text(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page_text(page), "python") and page not in NOT_RUN])
def test_python_examples_run(page, stock_repository, tmp_path, monkeypatch):
    """One after the other in one namespace; real checkpoints are replaced by a tiny one of the same format, on a CPU."""
    code = "\n".join(blocks(page_text(page), "python"))
    for trained in ("amused/amused-256", "runs/emoji/model"):
        code = code.replace(trained, Path(stock_repository).as_posix())
    code = code.replace('"cuda"', '"cpu"')
    if "LLaDA" in code:
        demo = InfoGainTextPipeline.from_pretrained("demo-text")
        demo.tokenizer.chat_template = "S"
        demo.save_pretrained(tmp_path / "llada")
        code = code.replace("GSAI-ML/LLaDA-8B-Instruct", (tmp_path / "llada").as_posix()).replace(
            "max_new_tokens=64", "max_new_tokens=16"
        )
    if "MMaDA" in code:
        make_mmada_pipeline().save_pretrained(tmp_path / "mmada")
        code = code.replace("Gen-Verse/MMaDA-8B-MixCoT", (tmp_path / "mmada").as_posix())
    if "showlab" in code:
        make_showo_pipeline().save_pretrained(tmp_path / "showo")
        code = code.replace("showlab/show-o", (tmp_path / "showo").as_posix())
    if "Lumina" in code:
        make_lumina_pipeline().save_pretrained(tmp_path / "lumina")
        code = code.replace("Alpha-VLLM/Lumina-DiMOO", (tmp_path / "lumina").as_posix())
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__main__"}
    with mock.patch.dict(rules.RULES), mock.patch.dict(rules.SAMPLERS):
        exec(compile(code, page, "exec"), names)
        for name in names:
            if name.startswith("test_"):
                names[name]()
    if page == "docs/getting_started.md":
        assert (tmp_path / "2.png").exists()


def test_excerpts_of_examples_are_verbatim():
    examples = [path.read_text(encoding="utf-8") for path in (ROOT / "examples").glob("*.py")]
    excerpts = [block for page in PAGES for block in blocks(page_text(page), "py")]
    assert len(excerpts) == 3
    for excerpt in excerpts:
        assert any(textwrap.indent(excerpt, 4 * " ") in example for example in examples), excerpt


def test_command_line_examples_parse():
    commands = set()
    for page in PAGES:
        code = "\n".join(blocks(page_text(page), "bash")).replace("\\\n", " ")
        for line in code.splitlines():
            words = shlex.split(line, comments=True)
            if "diffusers_infogain.cli" in words:
                words = words[words.index("diffusers_infogain.cli") :]
            elif words[:1] != ["diffusers-infogain"]:
                continue
            cli.build_parser().parse_args(words[1:])
            commands.add(words[1])
    assert commands == {
        "app",
        "benchmark",
        "generate",
        "show",
        "demo",
        "exact",
        "evaluate",
        "compare",
        "convert",
        "export",
        "text",
        "compare-text",
        "lm-eval",
        "samplers",
    }


def test_ci_runs_the_test_command_of_the_readme():
    command = next(block.strip() for block in blocks(README, "bash") if "pytest" in block)
    assert command in map(str.strip, (ROOT / ".ci" / "run").read_text().splitlines())


def test_the_rules_are_counted():
    count = sum(not sampler.looks_ahead for sampler in rules.SAMPLERS.values())
    words = {15: "fifteen", 16: "sixteen", 17: "seventeen", 18: "eighteen", 19: "nineteen", 20: "twenty"}
    for page in ("README.md", "CHANGELOG.md"):
        assert f"{words[count]} greedy rules" in page_text(page).lower()


def test_the_first_text_is_a_sudoku_that_is_right():
    (block,) = [block for block in blocks(page_text("docs/getting_started.md"), "python") if "demo-text" in block]
    (prompt,) = re.findall(r'tokenizer\("(S[1-4_]{16})"\)', block)
    writer = InfoGainTextPipeline.from_pretrained("demo-text")
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        (text,) = writer(input_ids=[writer.tokenizer(prompt).input_ids], max_new_tokens=0, num_runs=4, generator=generator).texts
        assert check_grid(text[1:]), text


def test_looking_ahead_spells_words():
    (block,) = [block for block in blocks(page_text("docs/own_model.md"), "python") if "WORDS" in block]
    names = {"torch": torch, "InfoGainScheduler": InfoGainScheduler}
    exec(block, names)
    assert names["spelt_right"]["confidence"] < 45
    assert names["spelt_right"]["info_gain"] > 80


def test_security_names_what_runs_code():
    page = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    assert "--allow-code-execution" in page
    assert "](SECURITY.md)" in README
