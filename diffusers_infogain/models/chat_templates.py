"""Chats as text, by the chat template of a checkpoint.

A template is a program by somebody else, which may be hostile: the time, memory and functions that it may use are bounded.
"""

from __future__ import annotations

import functools
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import _compile_jinja_template

from ..files import read_text
from ..printing import shown

_LONGEST_TEMPLATE = 100_000
"""In characters; published ones have up to 30,000."""
_SECONDS = 4.0
"""Time of the processor that a template may take, however busy the machine is."""
_UNITS, _UNITS_PER_CHARACTER = 1_000_000, 200
"""What a template may make in total: characters, list items and rounds of loops; more for longer chats."""
_CALL = 10
"""Units that a call costs in addition to what it makes, because of the time that it takes."""
# These make much out of little, or run without anything being counted. No published template needs them.
_REFUSED = {
    *("lipsum", "cycler", "joiner", "expandtabs", "translate", "maketrans", "format_map", "encode", "zfill", "center", "ljust"),
    *("rjust", "urlize", "wordwrap", "sum", "pprint", "striptags", "groupby", "xmlattr", "slice", "batch", "to_bytes"),
}
_WIDE = re.compile(r"\d{4,}|\{[^{}]*\{|%[^a-zA-Z%]*\*")
"""Numbers and nested fields in formats that ask for much text."""
_WIDEST_INDENT = 40
_END = "<end of what is continued> "
"""Marks where the last message ends until the text is rendered; templates may trim the space."""
# Names of filters that no template can write.
_SIZED = "bounded value"
_ROUNDS = "bounded rounds"
_JOINED = "bounded text"


class TemplateError(ValueError):
    """A chat template that fails, refuses the chat, or exceeds its budget."""


class _Budget:
    """The units and the time that are left to a template."""

    def __init__(self, units: int):
        self.left = units
        self.until = time.thread_time() + _SECONDS

    def spend(self, units: int) -> None:
        self.left -= units
        if self.left < 0 or time.thread_time() > self.until:
            raise TemplateError("it makes too much text or takes too many steps")

    def made(self, value: Any) -> Any:
        """Returns the value after paying for its characters and, nested as they are, for all its items."""
        waiting = [value]
        while waiting:
            item = waiting.pop()
            size = len(item) if isinstance(item, (str, bytes, list, tuple, dict)) else 0
            self.spend(1 + size)
            if isinstance(item, int) and item.bit_length() > 64:
                raise TemplateError("it makes numbers above 2**64")
            if isinstance(item, dict):
                waiting += [*item, *item.values()]
            elif isinstance(item, (list, tuple)):
                waiting += item
        return value

    def rounds(self, values: Iterable[Any], literal: int = 0) -> Iterator[Any]:
        """Yields the values of a loop; each pays for itself and for the literal text that its round may write."""
        for value in values:
            self.spend(1 + literal)
            yield value

    def text(self, parts: Iterable[Any], between: Any = "") -> str:
        """Joins the parts to one text, which is paid for before it is made."""
        texts = []
        for part in parts:
            texts.append(str(part))
            self.spend(1 + len(texts[-1]) + len(str(between)))
        return str(between).join(texts)

    def allow(self, name: str, receiver: Any, arguments: Sequence[Any]) -> None:
        """Pays for a call of a method or filter; raises if it would make much out of little."""
        if name in _REFUSED:
            raise TemplateError(f"it uses {name}, which is not allowed")
        texts = [value for value in arguments if isinstance(value, str)]
        if name in ("indent", "tojson"):
            widths = [value if isinstance(value, int) else len(value) for value in arguments if isinstance(value, (int, str))]
            if max(widths, default=0) > _WIDEST_INDENT:
                raise TemplateError(f"it indents by more than {_WIDEST_INDENT}")
        if name == "indent":
            self.spend(_WIDEST_INDENT * str(receiver).count("\n"))
        if name == "format" and _WIDE.search(str(receiver)):
            raise TemplateError("it formats with wide fields")
        if name == "strftime_now" and _WIDE.search("".join(texts)):
            raise TemplateError("it formats with wide fields")
        if name == "replace" and len(texts) > 1:
            self.spend(str(receiver).count(texts[0]) * len(texts[1]))
        self.spend(_CALL)


class _Counted(NodeTransformer):
    """Puts filters of the budget around the values of loops, joined texts and literal collections."""

    def _through(self, name: str, node: Any, *arguments: nodes.Expr) -> nodes.Filter:
        return nodes.Filter(node, name, list(arguments), [], None, None, lineno=node.lineno)

    def visit_For(self, node: nodes.For) -> nodes.For:  # noqa: N802
        if node.recursive:
            raise TemplateError("it has a recursive loop, which is not allowed")
        literal = sum(len(data.data) for part in node.body for data in part.find_all(nodes.TemplateData))
        literal += sum(len(str(constant.value)) for part in node.body for constant in part.find_all(nodes.Const))
        self.generic_visit(node)
        node.iter = self._through(_ROUNDS, node.iter, nodes.Const(literal))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:  # noqa: N802
        self.generic_visit(node)
        return self._through(_JOINED, nodes.List(node.nodes, lineno=node.lineno))

    def _value(self, node: Any) -> Any:
        self.generic_visit(node)
        return self._through(_SIZED, node) if getattr(node, "ctx", "load") == "load" else node

    visit_List = visit_Dict = visit_Tuple = _value  # noqa: N815


class _BoundedEnvironment(ImmutableSandboxedEnvironment):
    """A copy of an environment in which everything that a template does is paid for."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self, like: jinja2.Environment, budget: _Budget):
        extensions = [type(extension) for extension in like.extensions.values()]
        super().__init__(trim_blocks=like.trim_blocks, lstrip_blocks=like.lstrip_blocks, extensions=extensions)
        self.budget = budget
        self.finalize = budget.made
        self.globals = {name: value for name, value in like.globals.items() if name not in _REFUSED}
        self.tests = like.tests
        self.filters = {name: self._paid(name, filter_) for name, filter_ in like.filters.items()}
        self.filters |= {_SIZED: budget.made, _ROUNDS: budget.rounds, _JOINED: budget.text}

    def _paid(self, name: str, filter_: Callable[..., Any]) -> Callable[..., Any]:
        first = int(hasattr(filter_, "jinja_pass_arg"))

        @functools.wraps(filter_)
        def call(*args: Any, **kwargs: Any) -> Any:
            passed, values = args[:first], list(args[first:])
            if name == "join" and values:
                values[0] = [self.budget.made(value) for value in values[0]]
                between = [*values[1:], kwargs.get("d", "")][0]
                self.budget.spend(len(values[0]) * len(str(between)))
            self.budget.allow(name, values[0] if values else None, [*values[1:], *kwargs.values()])
            return self._made(filter_(*passed, *values, **kwargs))

        return call

    def _made(self, value: Any) -> Any:
        return self.budget.rounds(value) if isinstance(value, Iterator) else self.budget.made(value)

    def call(self, context: Any, called: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Pays for a call in the template: of a method, a macro or a global."""
        name = str(getattr(called, "__name__", type(called).__name__))
        receiver = getattr(getattr(called, "__wrapped__", called), "__self__", None)
        if name == "join" and isinstance(receiver, str) and len(args) == 1:
            return self.budget.text(args[0], receiver)
        self.budget.allow(name, receiver, [*args, *kwargs.values()])
        return self._made(super().call(context, called, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Pays for the result of an operator; raises if it would make much out of little."""
        if operator == "**":
            raise TemplateError("it uses **, which is not allowed")
        if operator == "*":
            for value, times in ((left, right), (right, left)):
                if isinstance(value, (str, bytes, list, tuple)) and isinstance(times, int):
                    self.budget.spend(max(times, 0) * sum(1 for _ in value))
        if operator == "%" and isinstance(left, str):
            self.budget.allow("format", left, list(right) if isinstance(right, tuple) else [right])
        return self.budget.made(super().call_binop(context, operator, left, right))


def _render(like: jinja2.Environment, source: str, variables: dict[str, Any]) -> str:
    """Renders a template; raises if it exceeds its budget or does what is not allowed."""
    if len(source) > _LONGEST_TEMPLATE:
        raise TemplateError(f"it has {len(source)} characters, more than {_LONGEST_TEMPLATE}")
    characters = len(json.dumps(variables))
    budget = _Budget(_UNITS + _UNITS_PER_CHARACTER * characters)
    environment = _BoundedEnvironment(like, budget)
    code = environment.compile(_Counted().visit(environment.parse(source)))
    template = jinja2.Template.from_code(environment, code, environment.make_globals(None))
    return budget.text(template.generate(variables))


_OWN_VARIABLES = ("messages", "add_generation_prompt")
"""What the variables of a template may not be called."""


def read_chat_template(tokenizer: PreTrainedTokenizerBase, template: str | os.PathLike[str] | None) -> str | None:
    """The text of a chat template.

    Args:
        tokenizer: May have several templates by name.
        template: The text itself, the path of a file with it (no string), or the name of one of the tokenizer's.

    Raises:
        ValueError: If it is none of these, or the file cannot be read.
    """
    if template is None:
        return None
    if isinstance(template, os.PathLike):
        return read_text(template, 4 * _LONGEST_TEMPLATE)
    named = tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else {}
    if isinstance(template, str) and template in named:
        return str(named[template])
    if not isinstance(template, str) or ("{{" not in template and "{%" not in template):
        names = f", the name of one of the tokenizer's ({', '.join(named)})" if named else ""
        raise ValueError(
            f"`chat_template` must be the text of a Jinja template, a pathlib.Path of a file with one{names} or None, got "
            f"{shown(template)}."
        )
    return template


def check_template_variables(variables: Any) -> dict[str, Any]:
    """Variables of a template as a dictionary of their own, as JSON returns it.

    Raises:
        ValueError: If a name cannot be a variable, or a value is not JSON's.
    """
    if variables is None:
        return {}
    names = list(variables) if isinstance(variables, dict) else [None]
    if not all(isinstance(name, str) and name.isidentifier() and name not in _OWN_VARIABLES for name in names):
        raise ValueError(
            f"`chat_template_kwargs` must be a dictionary of variables by name, others than {' and '.join(_OWN_VARIABLES)}, or "
            f"None, got {shown(variables)}."
        )
    try:
        return dict(json.loads(json.dumps(variables, allow_nan=False)))
    except (TypeError, ValueError, RecursionError):
        raise ValueError(f"`chat_template_kwargs` must have values that JSON knows, got {shown(variables)}.") from None


def chat_text(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[dict[str, Any]],
    *,
    continued: bool = False,
    template: str | None = None,
    variables: dict[str, Any] | None = None,
) -> str:
    """Writes a chat as text with the template of the tokenizer, as `apply_chat_template` does.

    Args:
        tokenizer: Has the template.
        messages: Dictionaries with "role" and "content".
        continued: Whether the text ends within the last message, for a model to continue it, instead of with the beginning of an
            answer.
        template: The text of another template.
        variables: What the template can read besides, such as {"enable_thinking": False}.

    Raises:
        ValueError: If there is no template, or the template refuses this chat or exceeds its budget.
    """
    name = tokenizer.name_or_path or "the tokenizer"
    if template is None and tokenizer.chat_template is None:
        raise ValueError(f"`messages` must be None for {name}, whose tokenizer has no `chat_template`, unless one is given.")
    described = f"the chat template of {name}" if template is None else "`chat_template`"
    chat = [dict(message) for message in messages]
    variables = check_template_variables(variables)
    try:
        if continued:
            begun = chat[-1]["content"]
            chat[-1]["content"] += _END
        # Messages as transformers hands them to templates, without the template of the checkpoint.
        plain = tokenizer.apply_chat_template(chat, chat_template="{{ messages | tojson }}", tokenize=False)
        own = {"messages": json.loads(str(plain)), "tools": None, "documents": None, **tokenizer.special_tokens_map}
        like = _compile_jinja_template("").environment
        source = tokenizer.get_chat_template() if template is None else template
        text = _render(like, source, {**own, **variables, "add_generation_prompt": not continued})
        if not continued:
            return text
        if _END.strip() not in text or begun.strip() not in text:
            raise TemplateError("it leaves out what is to be continued")
        trimmed = _END not in text
        text = text[: text.rindex(_END.strip())]
        return text.rstrip() if trimmed else text
    except Exception as error:  # a template can raise anything
        roles = ", ".join(str(message.get("role"))[:40] for message in messages[:8])
        reason = " ".join(str(error).split())[:500] or type(error).__name__
        raise ValueError(f"`messages`: {described} does not take a chat of the roles {roles}: {reason}.") from error
