import ast
import subprocess
import sys
from pathlib import Path

import pytest

import diffusers_infogain

PACKAGE = Path(diffusers_infogain.__file__).parent
# A module imports only what stands left of it; schedules and scoring import nothing of the package.
RANKS = {
    **dict.fromkeys(("schedules", "scoring", "masked_logits"), 0),
    **{
        "candidates": 1,
        "scheduling_infogain": 2,
        "lookahead": 3,
        "decoding": 4,
        "calls": 5,
        "image_generation": 6,
        "clip_generation": 7,
        "text_generation": 7,
        "cli": 9,
    },
}
CORE = [name for name, own in RANKS.items() if own <= 4]


def rank(module: str) -> int | None:
    top = module.split(".")[0]
    return 8 if top.startswith("pipeline_") else RANKS.get(top)


def own_imports(path: Path) -> set[str]:
    """The package's modules that a file imports, anywhere in it, as dotted names below the package."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
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
    assert own_imports(PACKAGE / "scheduling_infogain.py") == {"candidates", "masked_logits", "schedules", "scoring"}
    assert own_imports(PACKAGE / "evaluation" / "exact.py") == {"decoding", "scheduling_infogain"}
    assert {"candidates", "image_generation"} <= own_imports(PACKAGE / "pipeline_infogain.py")


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_modules_import_only_what_stands_left_of_them(path):
    own = rank(path.stem) if path.parent == PACKAGE else None
    for module in own_imports(path):
        if own is not None and rank(module) is not None:
            lower = rank(module) < own
            assert lower or (own == 7 and rank(module) == 7 and module == "pipeline_infogain"), f"{path.stem} imports {module}"
        if path.stem in CORE and path.parent == PACKAGE:
            assert module in CORE, f"{path.stem} imports {module}"


def test_evaluation_never_imports_a_pipeline():
    for path in (PACKAGE / "evaluation").rglob("*.py"):
        assert not any(module.split(".")[0] == "cli" or "pipeline" in module.lower() for module in own_imports(path))


def test_only_the_command_line_imports_the_command_line():
    for path in modules():
        if path.parent.name != "cli":
            assert not any(module.split(".")[0] == "cli" for module in own_imports(path)), path


def test_the_command_line_starts_without_the_libraries_of_single_commands():
    code = """
import sys
from diffusers_infogain import cli
cli.build_parser()
print(*sys.modules)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent)
    assert run.returncode == 0, run.stderr
    assert not {"matplotlib", "torchmetrics", "lm_eval", "diffusers_infogain.evaluation.metrics"} & set(run.stdout.split())


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
import diffusers_infogain
print(*set(sys.modules) - by_others)
assert not {"matplotlib", "sklearn"} & set(sys.modules)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent)
    assert run.returncode == 0, run.stderr
    loaded = set(run.stdout.split())
    assert "diffusers_infogain.decoding" in loaded
    assert not {"matplotlib", "sklearn", "peft", "pandas", "torchmetrics", "lm_eval"} & loaded
