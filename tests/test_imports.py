import ast
import subprocess
import sys
from pathlib import Path

import pytest

import diffusers_infogain

PACKAGE = Path(diffusers_infogain.__file__).parent
# A module imports only what stands left of it; schedules and scoring import nothing of the package.
RANKS = {
    **dict.fromkeys(("choices", "schedules", "scoring", "masked_logits", "printing", "text_canvas"), 0),
    **{
        "checks": 1,
        "candidates": 2,
        "scheduling_infogain": 3,
        "lookahead": 4,
        "decoding": 5,
        "callbacks": 6,
        "components": 7,
        "image_call": 8,
        "image_pipeline": 9,
        "image_pipeline_clip": 10,
        "image_pipeline_sequence": 10,
        "text_output": 6,
        "text_generation": 9,
        "cli": 12,
    },
}
CORE = [name for name, own in RANKS.items() if own <= 5]


def rank(module: str) -> int | None:
    top = module.split(".")[0]
    return 11 if top.startswith("pipeline_") else RANKS.get(top)


def own_imports(path: Path) -> set[str]:
    """The package's modules that a file imports, anywhere in it, as dotted names below the package."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts if path.is_relative_to(PACKAGE) else ()
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = list(parts[: len(parts) - node.level]) if node.level else []
            absolute = (node.module or "").split(".") if node.module else []
            if node.level == 0:
                if absolute[:1] != [PACKAGE.name]:
                    continue
                absolute = absolute[1:]
            module = base + absolute
            found |= {".".join(module)} if module else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name.removeprefix(PACKAGE.name + ".") for a in node.names if a.name.split(".")[0] == PACKAGE.name}
    return found


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def test_the_imports_are_found():
    assert own_imports(PACKAGE / "scheduling_infogain.py") == {
        "candidates",
        "checks",
        "choices",
        "masked_logits",
        "printing",
        "schedules",
        "scoring",
    }
    assert own_imports(PACKAGE / "evaluation" / "exact.py") == {
        "choices",
        "decoding",
        "evaluation.tables",
        "evaluation.text_tasks",
        "extras",
        "progress",
        "scheduling_infogain",
    }
    assert {"candidates", "image_pipeline"} <= own_imports(PACKAGE / "pipeline_infogain.py")


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_modules_import_only_what_stands_left_of_them(path):
    own = rank(path.stem) if path.parent == PACKAGE else None
    for module in own_imports(path):
        if own is not None and rank(module) is not None:
            lower = rank(module) < own
            assert lower or (own == 11 and rank(module) == 11 and module == "pipeline_infogain"), f"{path.stem} imports {module}"
        if path.stem in CORE and path.parent == PACKAGE:
            assert module in CORE, f"{path.stem} imports {module}"


def test_evaluation_never_imports_a_pipeline():
    for path in (PACKAGE / "evaluation").rglob("*.py"):
        assert not any(module.split(".")[0] == "cli" or "pipeline" in module.lower() for module in own_imports(path))


def test_only_the_command_line_imports_the_command_line():
    examples = sorted((PACKAGE.parent / "examples").glob("*.py"))
    assert "evaluation.runs" in own_imports(PACKAGE.parent / "examples" / "train_demo_model.py")
    for path in [*modules(), *examples]:
        if path.parent.name != "cli":
            assert not any(module.split(".")[0] == "cli" for module in own_imports(path)), path


def in_a_new_process(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=PACKAGE.parent)


@pytest.mark.parametrize(
    ("arguments", "code"), [(["--help"], 0), (["--version"], 0), ([], 2), (["generat"], 2), (["samplers"], 0)], ids=str
)
def test_help_and_typos_are_answered_without_heavy_libraries(arguments, code):
    program = """
import sys
from diffusers_infogain import cli
try:
    code = cli.main(sys.argv[1:])
except SystemExit as stopped:
    code = stopped.code
print("loaded", *sys.modules)
raise SystemExit(code)
"""
    run = in_a_new_process(program, *arguments)
    assert run.returncode == code, run.stderr
    loaded = run.stdout.rpartition("loaded ")[2].split()
    assert "diffusers_infogain.cli" in loaded
    assert not {"torch", "diffusers", "transformers", "numpy", "PIL", "matplotlib", "torchmetrics", "lm_eval"} & set(loaded)


def test_every_command_helps_without_heavy_libraries():
    program = """
import contextlib, io, sys
from diffusers_infogain import cli
for command in cli.COMMANDS:
    for flags in (["--help"], ["--no-such-flag"]):
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            try:
                cli.main([command.name, *flags])
            except SystemExit:
                pass
assert not {"torch", "diffusers", "transformers", "numpy"} & set(sys.modules)
"""
    run = in_a_new_process(program)
    assert run.returncode == 0, run.stderr


def test_names_of_the_package_are_imported_when_they_are_asked_for():
    program = """
import sys
import diffusers_infogain
assert not {"torch", "diffusers", "transformers"} & set(sys.modules)
assert set(diffusers_infogain.__all__) <= set(dir(diffusers_infogain))
assert set(diffusers_infogain.__all__) == {*diffusers_infogain._MODULES, "CUSTOM_PIPELINE"}
for name in diffusers_infogain.__all__:
    assert getattr(diffusers_infogain, name) is not None, name
try:
    diffusers_infogain.no_such_name
except AttributeError as error:
    assert str(error) == "module 'diffusers_infogain' has no attribute 'no_such_name'"
else:
    raise SystemExit("no error")
assert not {"matplotlib", "sklearn", "torchmetrics", "lm_eval"} & set(sys.modules)
"""
    run = in_a_new_process(program)
    assert run.returncode == 0, run.stderr


def test_type_checkers_see_the_names_that_are_imported_late():
    source = (PACKAGE / "__init__.py").read_text()
    (block,) = [node for node in ast.parse(source).body if isinstance(node, ast.If)]
    seen = {alias.name: node.module for node in block.body for alias in node.names}
    assert seen == diffusers_infogain._MODULES


def test_scheduler_module_holds_the_name_by_which_diffusers_knows_how_to_load_it():
    from diffusers_infogain import scheduling_infogain

    assert issubclass(scheduling_infogain.InfoGainScheduler, scheduling_infogain.SchedulerMixin)
    assert scheduling_infogain.InfoGainScheduler.__module__ == "diffusers_infogain.scheduling_infogain"


def test_optional_and_heavy_packages_are_not_imported_with_the_package():
    # what the required libraries load on their own account does not count
    code = """
import sys
from diffusers import AmusedPipeline, DiffusionPipeline, UVit2DModel, VQModel
from transformers import CLIPTextModelWithProjection, CLIPTokenizer
import diffusers.loaders, diffusers.callbacks
by_others = set(sys.modules)
from diffusers_infogain import *
print(*set(sys.modules) - by_others)
assert not {"matplotlib", "sklearn"} & set(sys.modules)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent)
    assert run.returncode == 0, run.stderr
    loaded = set(run.stdout.split())
    assert "diffusers_infogain.decoding" in loaded
    assert not {"matplotlib", "sklearn", "peft", "pandas", "torchmetrics", "lm_eval"} & loaded
