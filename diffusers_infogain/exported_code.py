"""The code of a pipeline as a few flat modules that run without this package.

diffusers runs a repository's `pipeline.py` and the modules beside it, without folders. The modules are computed from the source
of this package: definitions that the pipelines reach, by name, through all relative imports. What only loads published formats
is left out, and `checkpoints/standalone.py` takes the place of `checkpoints/published.py`.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import textwrap
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from . import __version__

PACKAGE = Path(__file__).parent

STAND_INS = {"checkpoints.published": "checkpoints.standalone"}
"""Modules that others replace in the export."""

LOADING = ("from_pretrained", "is_published", "open_published")
"""Methods of pipelines that are left out, because only loading published formats needs them."""

ENTRY = "pipeline.py"
"""The file that diffusers runs."""

_LONGEST_LINE = 130

HEADER = f"""\
# Part of diffusers_infogain {__version__}, written by its command `export`.
# SPDX-License-Identifier: Apache-2.0
# Licensed under the Apache License, Version 2.0: https://www.apache.org/licenses/LICENSE-2.0
"""

_ENTRY = '''\
"""The pipeline of this repository, for `custom_pipeline` of `DiffusionPipeline.from_pretrained`."""

import sys
from typing import TYPE_CHECKING

_DIGEST = "{digest}"
_MODULES = (
{modules}
)
# In one process diffusers runs every local pipeline.py in the same module, and expects to find a single class there.
for _name, _value in list(globals().items()):
    if isinstance(_value, type):
        del globals()[_name]
if globals().get("_LOADED") != _DIGEST:
    for _name in _MODULES:
        sys.modules.pop(f"{{__package__}}.{{_name}}", None)
_LOADED = _DIGEST

{classes}

as_exported({name}, _MODULES, ({components}))

# Of a folder diffusers takes only the modules that this file names. From the Hub it would fetch a module once for every path of
# imports that leads to it: the space in their `from . module import name` keeps it from following those of the other files.
if TYPE_CHECKING:
{imports}
'''


@dataclass
class _Module:
    """A module of the package: its statements, and which of them define a name.

    Attributes:
        name: Below the package, such as "models.llada".
        kept: The indices of the statements that are exported.
    """

    name: str
    kept: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        path = PACKAGE.joinpath(*self.name.split(".")).with_suffix(".py")
        self.text = path.read_text(encoding="utf-8")
        self.lines = self.text.splitlines()
        self.body = ast.parse(self.text).body
        self.is_pipeline = self.name.startswith("pipeline_")
        self.bound: dict[str, int] = {}
        for index, statement in enumerate(self.body):
            for name in _bound(statement):
                self.bound[name] = index

    def parts(self, statement: ast.stmt) -> Iterator[ast.AST]:
        """All nodes of a statement that are exported."""
        left_out = {id(member) for member in self.left_out(statement)}
        waiting: list[ast.AST] = [statement]
        while waiting:
            node = waiting.pop()
            if id(node) not in left_out:
                yield node
                waiting.extend(ast.iter_child_nodes(node))

    def left_out(self, statement: ast.stmt) -> list[ast.stmt]:
        """The members of a class that are not exported."""
        if not (self.is_pipeline and isinstance(statement, ast.ClassDef)):
            return []
        return [member for member in statement.body if isinstance(member, ast.FunctionDef) and member.name in LOADING]

    @functools.cached_property
    def always(self) -> list[int]:
        """Statements that do something by themselves, such as functions that a decorator of the package registers."""
        return [index for index, statement in enumerate(self.body) if self._acts(index, statement)]

    def _acts(self, index: int, statement: ast.stmt) -> bool:
        if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
            if statement.name == "__getattr__":
                return True
            nodes = (node for decorator in statement.decorator_list for node in ast.walk(decorator))
            return any(self._own(node.id) for node in nodes if isinstance(node, ast.Name))
        if isinstance(statement, ast.Expr):
            return not _is_text(statement) or index == 0
        if isinstance(statement, (ast.Import, ast.ImportFrom)):
            return getattr(statement, "module", None) == "__future__" or self.is_for_others(statement)
        return not _bound(statement)

    def is_for_others(self, statement: ast.stmt) -> bool:
        """Whether an import is marked as one that this module does not use itself."""
        return "noqa: F401" in self.lines[(statement.end_lineno or statement.lineno) - 1]

    def _own(self, name: str) -> bool:
        statement = self.body[self.bound[name]] if name in self.bound else None
        return isinstance(statement, ast.FunctionDef) or (isinstance(statement, ast.ImportFrom) and statement.level > 0)


def _bound(statement: ast.stmt) -> list[str]:
    """The names that a statement defines."""
    if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
        return [statement.name]
    if isinstance(statement, (ast.Import, ast.ImportFrom)):
        return [alias.asname or alias.name.partition(".")[0] for alias in statement.names]
    targets = statement.targets if isinstance(statement, ast.Assign) else []
    targets = [statement.target] if isinstance(statement, ast.AnnAssign) else targets
    return [node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name) and _stored(node)]


def _stored(node: ast.Name) -> bool:
    return isinstance(node.ctx, ast.Store)


def _is_text(statement: ast.stmt) -> bool:
    value = statement.value if isinstance(statement, ast.Expr) else None
    return isinstance(value, ast.Constant) and isinstance(value.value, str)


def _is_module(name: str) -> bool:
    return bool(name) and PACKAGE.joinpath(*name.split(".")).with_suffix(".py").is_file()


def _source(module: str, statement: ast.ImportFrom) -> str:
    """The module, or the package, below this one, from which a relative import takes its names."""
    above = module.split(".")[: -statement.level]
    return ".".join([*above, *filter(None, [statement.module])])


class _Reached:
    """What some definitions of the package need of it."""

    def __init__(self, definitions: Iterable[tuple[str, str]]):
        self.modules: dict[str, _Module] = {}
        for module, name in definitions:
            self.reach(module, name)

    def module(self, name: str) -> _Module:
        """A module, with all its statements that do something by themselves."""
        if name not in self.modules:
            self.modules[name] = _Module(name)
            for index in self.modules[name].always:
                self._keep(self.modules[name], index)
        return self.modules[name]

    def reach(self, module_name: str, name: str) -> None:
        """Keeps the definition of a name, and all that it needs."""
        module = self.module(STAND_INS.get(module_name, module_name))
        if name not in module.bound:
            raise ValueError(f"{module.name} does not define {name}.")
        self._keep(module, module.bound[name])

    def _keep(self, module: _Module, index: int) -> None:
        if index in module.kept:
            return
        module.kept.add(index)
        following = index + 1
        if following < len(module.body) and _is_text(module.body[following]) and not _is_text(module.body[index]):
            module.kept.add(following)  # the description of an assignment
        statement = module.body[index]
        if isinstance(statement, (ast.Import, ast.ImportFrom)):
            return  # `_use` says which of its names are wanted
        nodes = list(module.parts(statement))
        attributes: dict[str, set[str]] = defaultdict(set)
        for node in nodes:
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                attributes[node.value.id].add(node.attr)
            elif isinstance(node, ast.ImportFrom) and node.level:
                for alias in node.names:
                    self._import(module, node, alias, set())
        for node in nodes:
            if isinstance(node, ast.Name) and node.id in module.bound:
                self._use(module, node.id, attributes[node.id])

    def _use(self, module: _Module, name: str, attributes: set[str]) -> None:
        index = module.bound[name]
        statement = module.body[index]
        self._keep(module, index)
        if isinstance(statement, ast.ImportFrom) and statement.level:
            alias = next(alias for alias in statement.names if (alias.asname or alias.name) == name)
            self._import(module, statement, alias, attributes)

    def _import(self, module: _Module, statement: ast.ImportFrom, alias: ast.alias, attributes: set[str]) -> None:
        source = _source(module.name, statement)
        whole = f"{source}.{alias.name}".lstrip(".")
        if _is_module(whole):
            for attribute in attributes:
                self.reach(whole, attribute)
        elif _is_module(source):
            self.reach(source, alias.name)
        elif alias.name != "__version__":
            raise ValueError(f"{module.name} imports {alias.name} from the package itself.")


def flat_name(module: str) -> str:
    """The name of an exported module, which says whose it is: diffusers keeps those of all repositories in one place."""
    module = STAND_INS.get(module, module).replace(".", "_")
    return module if "infogain" in module else f"infogain_{module}"


class _Writer:
    """Writes one exported module."""

    def __init__(self, module: _Module):
        self.module = module
        self.needs: set[str] = set()
        self.used = {node.id for index in module.kept for node in self._nodes(index) if isinstance(node, ast.Name)}

    def _nodes(self, index: int) -> Iterator[ast.AST]:
        return self.module.parts(self.module.body[index])

    def text(self) -> str:
        """The module's source: header, and the statements that are kept, as they stand."""
        parts, end, blank = [], 0, 0
        for index, statement in enumerate(self.module.body):
            start, stop = self._start(statement, end), statement.end_lineno or statement.lineno
            blank = max(blank, min(2, self._blank_lines_before(start)))
            if index in self.module.kept:
                written = self._written(statement, start, stop)
                if written:
                    parts.append("\n" * blank + written)
                    blank = 0
            end = stop
        return HEADER + "\n" + "\n".join(parts).lstrip("\n") + "\n"

    def _start(self, statement: ast.stmt, end: int) -> int:
        """The first line, from 0, of a statement with its decorators and the comments above it."""
        start = min([statement.lineno, *(node.lineno for node in getattr(statement, "decorator_list", []))]) - 1
        while start > end and self.module.lines[start - 1].lstrip().startswith("#"):
            start -= 1
        return start

    def _blank_lines_before(self, start: int) -> int:
        count = 0
        while start - count > 0 and not self.module.lines[start - count - 1].strip():
            count += 1
        return count

    def _written(self, statement: ast.stmt, start: int, stop: int) -> str:
        lines = self.module.lines
        if isinstance(statement, (ast.Import, ast.ImportFrom)):
            comments = lines[start : statement.lineno - 1]
            imported = self._imported(statement, self.used, self.module.is_for_others(statement))
            return "\n".join([*comments, imported]) if imported else ""
        replaced: dict[int, list[str]] = {}
        skipped: set[int] = set()
        previous = statement.lineno
        for member in getattr(statement, "body", []):
            if member in self.module.left_out(statement):
                first = self._start(member, previous)
                first -= self._blank_lines_before(first)
                skipped.update(range(first, member.end_lineno))
            previous = member.end_lineno
        for node in self.module.parts(statement):
            if isinstance(node, ast.Import):  # with a comment behind it, diffusers does not ask for the package
                replaced[node.lineno - 1] = [f"{lines[node.lineno - 1]}  # optional"]
            elif isinstance(node, ast.ImportFrom) and node.level:
                text = self._imported(node, {alias.asname or alias.name for alias in node.names}, False)
                replaced[node.lineno - 1] = [" " * node.col_offset + line for line in text.splitlines()]
                skipped.update(range(node.lineno - 1, node.end_lineno or node.lineno))
        written = []
        for number in range(start, stop):
            written += replaced.get(number, [] if number in skipped else [lines[number]])
        return "\n".join(written)

    def _imported(self, statement: ast.Import | ast.ImportFrom, used: set[str], keep: bool) -> str:
        """An import of the names in use, from flat modules; `keep` keeps names that only other modules use."""
        aliases = [a for a in statement.names if keep or (a.asname or a.name.partition(".")[0]) in used]
        written = [a.name + (f" as {a.asname}" if a.asname else "") for a in aliases]
        if isinstance(statement, ast.Import):
            return "\n".join(f"import {name}" for name in written)
        if statement.module == "__future__":
            return "from __future__ import annotations"
        if not statement.level:
            return _import_line(f"from {statement.module} import ", written, keep)
        source = _source(self.module.name, statement)
        lines, names = [], []
        for alias, name in zip(aliases, written, strict=True):
            whole = f"{source}.{alias.name}".lstrip(".")
            if _is_module(whole):
                self.needs.add(STAND_INS.get(whole, whole))
                lines.append(f"from . import {flat_name(whole)} as {alias.asname or alias.name}")
            elif not _is_module(source):
                lines.append(f'{alias.asname or alias.name} = "{__version__}"')
            else:
                names.append(name)
        if names:
            self.needs.add(STAND_INS.get(source, source))
            lines.append(_import_line(f"from . {flat_name(source)} import ", names, keep))
        return "\n".join(lines)


def _import_line(start: str, names: list[str], unused: bool) -> str:
    if not names:
        return ""
    line = start + ", ".join(names) + ("  # noqa: F401" if unused else "")
    if len(line) <= _LONGEST_LINE:
        return line
    return f"{start}(\n" + "\n".join(f"    {name}," for name in names) + "\n)" + ("  # noqa: F401" if unused else "")


def flat_modules(definitions: Iterable[tuple[str, str]], reached_by: Iterable[tuple[str, str]]) -> dict[str, str]:
    """The source of the modules that some definitions need, by file name.

    Args:
        definitions: Module, below the package, and name of each.
        reached_by: All definitions that exports may begin with. A module is the same in all of them, since diffusers keeps the
            modules of several repositories in one place.

    Raises:
        ValueError: If one of them needs something that cannot be exported.
    """
    definitions = list(definitions)
    modules = _Reached([*reached_by, *definitions]).modules
    files: dict[str, str] = {}
    waiting = {module for module, _ in definitions}
    while waiting:
        name = waiting.pop()
        writer = _Writer(modules[name])
        files[f"{flat_name(name)}.py"] = writer.text()
        waiting |= {needed for needed in writer.needs if f"{flat_name(needed)}.py" not in files}
    return dict(sorted(files.items()))


def entry_module(pipeline: tuple[str, str], components: Iterable[tuple[str, str]], files: Mapping[str, str]) -> str:
    """The source of `pipeline.py`.

    Args:
        pipeline: Module, below the package, and name of the pipeline's class.
        components: The same of its components' classes.
        files: Its modules, by file name.
    """
    components = sorted(components)
    standalone = ("checkpoints.standalone", "as_exported")
    classes = [f"from .{flat_name(module)} import {name}  # noqa: E402" for module, name in (pipeline, standalone, *components)]
    digest = hashlib.sha256("".join(files.values()).encode()).hexdigest()[:16]
    imports = [f"from .{file.removesuffix('.py')} import __doc__" for file in files]
    written = _ENTRY.format(
        digest=digest,
        modules=textwrap.indent("\n".join(f'"{file.removesuffix(".py")}",' for file in files), 4 * " "),
        classes="\n".join(sorted(classes)),
        name=pipeline[1],
        components="".join(f"{name}, " for _, name in components).rstrip(),
        imports=textwrap.indent("\n".join(imports), 4 * " "),
    )
    return HEADER + "\n" + written
