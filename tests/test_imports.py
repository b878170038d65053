import ast
import subprocess
import sys
from pathlib import Path

import pytest

import diffusers_infogain

PACKAGE = Path(diffusers_infogain.__file__).parent
# From the bottom up. A module imports from its own layer or from those below it, and never in a circle.
LAYERS = {
    "ground": [
        "docstrings",
        "printing",
        "extras",
        "progress",
        "processes",
        "files",
        "_files",
        "output_folders",
        "checks",
        "settings",
        "choices",
        "cache_settings",
        "model_sizes",
    ],
    "sampler": [
        "scoring",
        "masked_logits",
        "reductions",
        "candidates",
        "schedules",
        "token_frequencies",
        "step",
        "halton",
        "rules",
        "correctors",
        "migration",
        "proposal",
        "denoising",
        "lookahead",
        "stock_scheduler",
        "settings_in_use",
        "scheduling_infogain",
        "trace",
        "trace_",
        "decoding",
        "search",
    ],
    "models": [
        "models",
        "checkpoints",
        "callbacks",
        "components",
        "compiling",
        "devices",
        "editing",
        "guidance",
        "lora",
        "model_cards",
        "pictures",
        "text_ends",
        "text_likelihood",
        "visualization",
    ],
    "evaluation": ["demo", "evaluation"],
    "generation": [
        *("image_call", "image_cache", "image_rows", "image_output", "image_pipeline", "image_pipeline_"),
        *("text_branches", "text_canvas", "text_constraints", "text_generation", "text_output", "text_processors"),
    ],
    "pipelines": ["pipeline_"],
    "loading": ["loading", "memory", "random_models", "custom_pipeline", "exporting", "exported_code", "modular"],
    "app": ["app"],
    "command line": ["cli"],
}
ORDER = list(LAYERS)


def layer(module: str) -> int:
    """The number of a module's layer; an error if it has none."""
    top = module.split(".")[0]
    (own,) = [
        number
        for number, names in enumerate(LAYERS.values())
        if any(
            top == name or (name[-1] == "_" and top.startswith(name)) or (name[0] == "_" and top.endswith(name)) for name in names
        )
    ]
    return own


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
            for alias in node.names:
                inside = PACKAGE.joinpath(*module)
                imports_module = not module or (inside / f"{alias.name}.py").is_file() or (inside / alias.name).is_dir()
                found.add(".".join([*module, alias.name] if imports_module else module))
        elif isinstance(node, ast.Import):
            found |= {a.name.removeprefix(PACKAGE.name + ".") for a in node.names if a.name.split(".")[0] == PACKAGE.name}
    return found


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def targets(module: str, names: set[str]) -> set[str]:
    """The modules that an import of `module` means: itself, or the initialization of a package."""
    return {module} & names or {f"{module}.__init__"} & names


def test_the_imports_are_found():
    assert {"candidates", "checks", "correctors", "rules", "settings"} <= own_imports(PACKAGE / "scheduling_infogain.py")
    assert {"choices", "decoding", "search"} <= own_imports(PACKAGE / "evaluation" / "exact.py")
    assert {"evaluation.runs", "evaluation.tables"} <= own_imports(PACKAGE / "cli" / "compare.py")
    assert "scheduling_infogain" in own_imports(PACKAGE / "pipeline_infogain.py")


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_modules_import_from_their_own_layer_or_below(path):
    if path == PACKAGE / "__init__.py":
        return  # the public names, from everywhere
    own, names = layer(name_of(path)), {name_of(module) for module in modules()}
    for module in own_imports(path):
        if not targets(module, names):
            assert module.startswith("__") or own >= ORDER.index("loading"), f"{path} imports {module} from the top"
        else:
            assert layer(module) <= own, f"{name_of(path)} ({ORDER[own]}) imports {module} ({ORDER[layer(module)]})"


def test_no_modules_import_each_other_in_a_circle():
    names = {name_of(path) for path in modules()}
    graph = {
        name_of(path): {target for module in own_imports(path) for target in targets(module, names)} - {name_of(path)}
        for path in modules()
        if path != PACKAGE / "__init__.py"
    }
    done: set[str] = set()

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, " -> ".join((*above[above.index(module) :], module))
        if module not in done:
            for imported in sorted(graph.get(module, ())):
                visit(imported, (*above, module))
            done.add(module)

    for module in sorted(graph):
        visit(module, ())
    assert len(done) >= len(graph) > 60


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
    assert not {"torch", "diffusers", "transformers", "numpy", "PIL", "matplotlib", "torchmetrics", "lm_eval", "gradio"} & set(
        loaded
    )


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


def test_names_of_the_package_are_imported_when_they_are_asked_for_without_optional_and_heavy_packages():
    # what the required libraries load on their own account does not count
    program = """
import sys
import diffusers_infogain
assert not {"torch", "diffusers", "transformers"} & set(sys.modules)
assert set(diffusers_infogain.__all__) <= set(dir(diffusers_infogain))
assert set(diffusers_infogain.__all__) == {*diffusers_infogain._MODULES, "CUSTOM_PIPELINE"}
from diffusers import AmusedPipeline, DiffusionPipeline, UVit2DModel, VQModel
from transformers import CLIPTextModelWithProjection, CLIPTokenizer
import diffusers.loaders, diffusers.callbacks
by_others = set(sys.modules)
for name in diffusers_infogain.__all__:
    assert getattr(diffusers_infogain, name) is not None, name
from diffusers_infogain import *
try:
    diffusers_infogain.no_such_name
except AttributeError as error:
    assert str(error) == "module 'diffusers_infogain' has no attribute 'no_such_name'"
else:
    raise SystemExit("no error")
assert not {"matplotlib", "sklearn", "torchmetrics", "lm_eval"} & set(sys.modules)
print(*set(sys.modules) - by_others)
"""
    run = in_a_new_process(program)
    assert run.returncode == 0, run.stderr
    loaded = set(run.stdout.split())
    assert "diffusers_infogain.decoding" in loaded
    assert not {"matplotlib", "sklearn", "peft", "pandas", "torchmetrics", "lm_eval"} & loaded


def test_type_checkers_see_the_names_that_are_imported_late():
    source = (PACKAGE / "__init__.py").read_text()
    (block,) = [node for node in ast.parse(source).body if isinstance(node, ast.If)]
    seen = {alias.name: node.module for node in block.body for alias in node.names}
    assert seen == diffusers_infogain._MODULES


def test_scheduler_module_holds_the_name_by_which_diffusers_knows_how_to_load_it():
    from diffusers_infogain import scheduling_infogain

    assert issubclass(scheduling_infogain.InfoGainScheduler, scheduling_infogain.SchedulerMixin)
    assert scheduling_infogain.InfoGainScheduler.__module__ == "diffusers_infogain.scheduling_infogain"


def test_files_and_functions_stay_small():
    """A file of more than 500 lines is two things, and so is a function of more than 80; the call of a pipeline may have more."""
    for path in modules():
        text = path.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 500, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.end_lineno is not None:
                assert node.end_lineno - node.lineno < 80 or node.name == "__call__", f"{path}: {node.name}"
