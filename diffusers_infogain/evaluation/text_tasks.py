"""Text tasks whose answers a rule can check: one-way multiplication, 4x4 Sudoku, Countdown.

A problem is a frozen dataclass with `check(answer)`, which parses the whole answer and never searches it for a right part;
`rules`, `question` and `solution` for `few_shot_prompt`; `held_out`, its side of a fixed split of all problems, seven to one; and
`split`, one of three equal parts of all problems, independent of that.
Multiplication and Sudoku can also be infilled: `template` is the text with `MASK` for every character to fill in, and `letter`
precedes it in the training data of the embedded model (see `diffusers_infogain/demo/text_model`). `sample_*` draw problems with
a `torch.Generator`.
"""

from __future__ import annotations

import ast
import functools
import itertools
import operator
import re
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, ClassVar, Literal, TypeVar, get_args

import torch

from ..checks import check_bool, check_choice, check_integer, check_type
from ..choices import SPLITS
from .splits import split_of

MASK = "_"
"""The character of a template that stands for one to fill in."""

MAX_FACTOR = 31
FACTOR_DIGITS = len(str(MAX_FACTOR))
PRODUCT_BITS = (MAX_FACTOR**2).bit_length()
SUDOKU_DIGITS = "1234"

Given = Literal["factors", "product", "nothing"]
Problem = TypeVar("Problem", "MultiplicationProblem", "SudokuProblem", "CountdownProblem")

_HELD_OUT_ONE_IN = 8
_EQUATION = re.compile(rf"([0-9]{{{FACTOR_DIGITS}}})\*([0-9]{{{FACTOR_DIGITS}}})=([01]{{{PRODUCT_BITS}}})")
# What Python would read in other ways, such as 07, 1.5 or 1_0, is ruled out before Python parses it.
_EXPRESSION = re.compile(r"(?:(?:0|[1-9][0-9]*)(?![0-9])|[-+*/() ])*")
_OPERATORS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
# In characters: more than any answer to a Countdown problem needs, and too few for nesting that hits the recursion limit.
_MAX_EXPRESSION = 200


class _Problem:
    """A problem's place in the splits of all problems, which go by its `key`."""

    @property
    def key(self) -> str:
        """What tells it from others, but for the order of its parts."""
        raise NotImplementedError

    @property
    def held_out(self) -> bool:
        """Whether it is on the smaller side of the split that keeps problems out of training."""
        return zlib.crc32(self.key.encode()) % _HELD_OUT_ONE_IN == 0

    @property
    def split(self) -> str:
        """One of `choices.SPLITS`."""
        return split_of(self.key)


def _agrees(template: str, text: str) -> bool:
    return len(text) == len(template) and all(t in (MASK, c) for t, c in zip(template, text, strict=True))


def _draw(generator: torch.Generator, high: int) -> int:
    check_type("generator", generator, torch.Generator, "a torch.Generator")
    return int(torch.randint(high, (), generator=generator))


def _sample(draw: Callable[[], Problem], num: int, held_out: bool | None, split: str | None) -> list[Problem]:
    """Draws problems until there are `num` of the wanted parts."""
    check_integer("num", num, 0)
    if held_out is not None:
        check_bool("held_out", held_out)
    if split is not None:
        check_choice("split", split, SPLITS)
    problems: list[Problem] = []
    while len(problems) < num:
        problem = draw()
        if held_out in (None, problem.held_out) and split in (None, problem.split):
            problems.append(problem)
    return problems


def final_answer(reply: str) -> str:
    """Extracts the answer from a chat model's reply: the first non-empty line after its last "Answer:", or else the whole reply.

    Surrounding blanks, a final full stop and the markup of chat models (**bold**, `code`, $formula$, \\boxed{}) are removed.
    """
    *_, answer = re.split(r"(?i)\*{0,2}answer\*{0,2}\s*:\*{0,2}", reply)
    if answer != reply:
        answer = next((line for line in answer.splitlines() if line.strip(" *`")), "")
    return _bare(answer)


def first_line(reply: str) -> str:
    """The first line of a reply to a prompt that ends in "Answer:", without further problems that the model goes on to write."""
    return _bare(reply.strip().partition("\n")[0])


def _bare(answer: str) -> str:
    answer = answer.strip(" *`$.\n\r")
    boxed = re.fullmatch(r"\\boxed\{(.*)\}|\\\((.*)\\\)", answer)
    return (boxed[1] or boxed[2]).strip() if boxed else answer


# One-way multiplication.


def equation(a: int, b: int) -> str:
    """Writes an equation with decimal factors and a binary product, all zero-padded: "07*12=0001010100".

    Raises:
        ValueError: For a factor outside 0 to `MAX_FACTOR`.
    """
    for name, factor in (("a", a), ("b", b)):
        if not 0 <= factor <= MAX_FACTOR:
            raise ValueError(f"`{name}` must lie in 0 to {MAX_FACTOR}, got {factor}.")
    return f"{a:0{FACTOR_DIGITS}d}*{b:0{FACTOR_DIGITS}d}={a * b:0{PRODUCT_BITS}b}"


def check_equation(text: str) -> bool:
    """Whether the whole text is a true equation as `equation` writes them."""
    match = _EQUATION.fullmatch(text)
    if match is None:
        return False
    a, b, product = int(match[1]), int(match[2]), int(match[3], 2)
    return max(a, b) <= MAX_FACTOR and a * b == product


@dataclass(frozen=True)
class MultiplicationProblem(_Problem):
    """`a * b` with decimal factors and a binary product: a table lookup given the factors, a search given the product.

    Args:
        given: What the template shows: the "factors", the "product" (then every pair of factors with it is right) or "nothing".
    """

    letter: ClassVar[str] = "M"
    shots: ClassVar[int] = 0
    rules: ClassVar[str] = (
        f"Replace every {MASK} of the equation below so that it holds. The factors are decimal numbers up to {MAX_FACTOR} with "
        f"{FACTOR_DIGITS} digits; the product is a binary number with {PRODUCT_BITS}. Reply with the equation."
    )
    a: int
    b: int
    given: Given = "factors"

    def __post_init__(self):
        equation(self.a, self.b)
        check_choice("given", self.given, get_args(Given))

    @property
    def solution(self) -> str:
        """The equation that the problem was made from."""
        return equation(self.a, self.b)

    @property
    def template(self) -> str:
        """The equation with `MASK` for what is not given: "07*12=__________"."""
        blank = MASK * FACTOR_DIGITS
        factors = self.solution.partition("=")[0] if self.given == "factors" else f"{blank}*{blank}"
        product = self.solution.partition("=")[2] if self.given == "product" else MASK * PRODUCT_BITS
        return f"{factors}={product}"

    @property
    def question(self) -> str:
        """The template, and where the answer goes."""
        return f"Equation: {self.template}\nAnswer:"

    def similar(self, generator: torch.Generator) -> MultiplicationProblem:
        """Draws a problem with as much given, from the larger side of the split."""
        return sample_multiplications(1, generator, given=self.given, held_out=False)[0]

    @property
    def key(self) -> str:
        """The pair of factors, in either order."""
        return f"{min(self.a, self.b)}*{max(self.a, self.b)}"

    def check(self, answer: str) -> bool:
        """Whether the answer is a true equation that agrees with the template."""
        return check_equation(answer) and _agrees(self.template, answer)


def sample_multiplications(
    num: int, generator: torch.Generator, *, given: Given = "factors", held_out: bool | None = None, split: str | None = None
) -> list[MultiplicationProblem]:
    """Draws `num` problems with uniform factors, with replacement; `held_out` and `split` None draw from all parts.

    Raises:
        ValueError: As `MultiplicationProblem`, or for a negative `num`.
    """

    def draw() -> MultiplicationProblem:
        return MultiplicationProblem(_draw(generator, MAX_FACTOR + 1), _draw(generator, MAX_FACTOR + 1), given)

    return _sample(draw, num, held_out, split)


# 4x4 Sudoku.


def check_grid(text: str) -> bool:
    """Whether the text is 16 digits, row by row, with each of 1 to 4 once in every row, column and 2x2 box."""
    if len(text) != 16:
        return False
    rows = [text[i : i + 4] for i in range(0, 16, 4)]
    columns = [text[i::4] for i in range(4)]
    boxes = [text[i : i + 2] + text[i + 4 : i + 6] for i in (0, 2, 8, 10)]
    return all(sorted(unit) == list(SUDOKU_DIGITS) for unit in rows + columns + boxes)


@functools.cache
def sudoku_grids() -> tuple[str, ...]:
    """All 288 valid grids, in lexicographic order."""
    rows = ["".join(row) for row in itertools.permutations(SUDOKU_DIGITS)]
    halves = [a + b for a, b in itertools.product(rows, repeat=2) if set(a[:2]).isdisjoint(b[:2])]
    return tuple(filter(check_grid, map("".join, itertools.product(halves, repeat=2))))


@dataclass(frozen=True)
class SudokuProblem(_Problem):
    """A partly filled grid, as 16 characters in one line; every valid grid that agrees with the clues is right."""

    letter: ClassVar[str] = "S"
    shots: ClassVar[int] = 5
    rules: ClassVar[str] = (
        f"Solve the 4x4 Sudoku, whose rows are written one after the other. Replace every {MASK} by a digit from 1 to 4 so that "
        "every row, every column and every 2x2 box holds each digit once. Reply with the 16 digits in one line."
    )
    template: str
    """The clues, with `MASK` for the other cells: "12__3___________"."""

    def __post_init__(self):
        if re.fullmatch(f"[{SUDOKU_DIGITS}{MASK}]{{16}}", self.template) is None:
            raise ValueError(f"`template` must be 16 characters out of {SUDOKU_DIGITS}{MASK}, got {self.template!r}.")

    @property
    def solutions(self) -> tuple[str, ...]:
        """All right answers."""
        return tuple(grid for grid in sudoku_grids() if _agrees(self.template, grid))

    @property
    def solution(self) -> str:
        """One right answer."""
        return self.solutions[0]

    @property
    def question(self) -> str:
        """The template, and where the answer goes."""
        return f"Puzzle: {self.template}\nAnswer:"

    def similar(self, generator: torch.Generator) -> SudokuProblem:
        """Draws a problem with one right answer, from the larger side of the split."""
        drawn = (sample_sudokus(1, generator, held_out=False)[0] for _ in itertools.count())
        return next(problem for problem in drawn if len(problem.solutions) == 1)

    @property
    def key(self) -> str:
        """The clues. (The grids are not split: all parts share them.)"""
        return self.template

    def check(self, answer: str) -> bool:
        """Whether the answer is a valid grid that agrees with the clues."""
        return check_grid(answer) and _agrees(self.template, answer)


def sample_sudokus(
    num: int,
    generator: torch.Generator,
    *,
    clues: tuple[int, int] = (4, 12),
    held_out: bool | None = None,
    split: str | None = None,
) -> list[SudokuProblem]:
    """Draws `num` problems: a uniform grid, a uniform number of clues from `clues[0]` to `clues[1]`, at uniform cells.

    `held_out` and `split` None draw from all parts.

    Raises:
        ValueError: For `clues` that are not two ascending numbers from 0 to 15, or a negative `num`; and if `held_out` or `split`
            is given without any clues, since the empty grid is a single problem.
    """
    fewest, most = clues
    if not 0 <= fewest <= most <= 15:
        raise ValueError(f"`clues` must be two ascending numbers from 0 to 15, got {clues}.")
    for name, part in (("held_out", held_out), ("split", split)):
        if part is not None and most == 0:
            raise ValueError(f"`{name}` must be None for the one problem without clues, got {part}.")

    def draw() -> SudokuProblem:
        grid = sudoku_grids()[_draw(generator, len(sudoku_grids()))]
        number = fewest + _draw(generator, most - fewest + 1)
        kept = set(torch.randperm(16, generator=generator)[:number].tolist())
        return SudokuProblem("".join(digit if i in kept else MASK for i, digit in enumerate(grid)))

    return _sample(draw, num, held_out, split)


# Countdown.


def _value(node: ast.expr, numbers: list[int]) -> Fraction:
    """The value of a parsed expression; adds its numbers to the list from left to right."""
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        numbers.append(node.value)
        return Fraction(node.value)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        left = _value(node.left, numbers)
        return _OPERATORS[type(node.op)](left, _value(node.right, numbers))
    raise SyntaxError("neither a number nor an operation on two")


def evaluate_expression(text: str) -> tuple[Fraction, list[int]]:
    """The exact value of an expression, and its numbers from left to right.

    Expressions consist of non-negative integers without leading zeros, + - * / between two operands (no signs), parentheses and
    spaces.

    Raises:
        ValueError: If the whole text is not such an expression, or divides by zero.
    """
    numbers: list[int] = []
    try:
        if len(text) > _MAX_EXPRESSION or not _EXPRESSION.fullmatch(text):
            raise SyntaxError(text)
        return _value(ast.parse(text.strip(" "), mode="eval").body, numbers), numbers
    except (SyntaxError, ZeroDivisionError):
        shown = text if len(text) <= 80 else text[:77] + "..."
        raise ValueError(
            f"`text` must be an expression of integers, + - * /, parentheses and spaces that divides by no zero, got {shown!r}."
        ) from None


@dataclass(frozen=True)
class CountdownProblem(_Problem):
    """Reach `target` from `numbers` with + - * / and parentheses, using each number at most once.

    A number that occurs twice in `numbers` may be used twice. Intermediate results may be negative or fractions.
    """

    shots: ClassVar[int] = 3
    rules: ClassVar[str] = (
        "Combine the numbers with +, -, *, / and parentheses into an expression that equals the target. Each number may be used "
        "at most once, and not all of them have to be used. Reply with the expression only, in one line."
    )
    numbers: tuple[int, ...]
    target: int
    solution: str = field(default="", compare=False)
    """One right answer, if known."""

    def __post_init__(self):
        if not self.numbers or min(self.numbers) < 1:
            raise ValueError(f"`numbers` must be at least one positive integer, got {self.numbers}.")

    @property
    def question(self) -> str:
        """Numbers and target, and where the answer goes."""
        return f"Numbers: {', '.join(map(str, self.numbers))}\nTarget: {self.target}\nAnswer:"

    def similar(self, generator: torch.Generator) -> CountdownProblem:
        """Draws a problem with as many numbers, from the larger side of the split."""
        return sample_countdowns(1, generator, count=len(self.numbers), held_out=False)[0]

    @property
    def key(self) -> str:
        """The numbers, in any order, with the target."""
        return f"{sorted(self.numbers)}={self.target}"

    def check(self, answer: str) -> bool:
        """Whether the answer is an expression, as `evaluate_expression` reads it, that equals the target.

        It may end in "= target", as people write it, and holds nothing else.
        """
        expression, found, right = answer.partition("=")
        try:
            value, used = evaluate_expression(expression)
        except ValueError:
            return False
        if found and right.strip(" ") != str(self.target):
            return False
        return value == self.target and not Counter(used) - Counter(self.numbers)


def sample_countdowns(
    num: int,
    generator: torch.Generator,
    *,
    count: int = 4,
    max_number: int = 20,
    max_target: int = 100,
    held_out: bool | None = None,
    split: str | None = None,
) -> list[CountdownProblem]:
    """Draws `num` solvable problems with a solution each: uniform numbers, then random operations on at least two of them.

    Every intermediate result is a positive integer. The target lies in 1 to `max_target` and is not among the numbers.
    `held_out` and `split` None draw from all parts.

    Args:
        count: How many numbers a problem has.
        max_number: The upper bound of the numbers; the lower bound is 1.

    Raises:
        ValueError: For a `count` below 2, a `max_number` below 2, a `max_target` below 10 or a negative `num`.
    """
    for name, value, least in (("count", count, 2), ("max_number", max_number, 2), ("max_target", max_target, 10)):
        check_integer(name, value, least)

    def draw() -> CountdownProblem:
        while True:
            numbers = [1 + _draw(generator, max_number) for _ in range(count)]
            used = 2 + _draw(generator, count - 1)
            order = torch.randperm(count, generator=generator)[:used].tolist()
            parts = [(numbers[i], str(numbers[i])) for i in order]
            while len(parts) > 1:
                (x, left), (y, right) = (parts.pop(_draw(generator, len(parts))) for _ in range(2))
                results = {"+": x + y, "*": x * y}
                if x > y:
                    results["-"] = x - y
                if x % y == 0:
                    results["/"] = x // y
                sign = list(results)[_draw(generator, len(results))]
                parts.append((results[sign], f"({left} {sign} {right})"))
            target, expression = parts[0]
            if target <= max_target and target not in numbers:
                return CountdownProblem(tuple(numbers), target, expression[1:-1])

    return _sample(draw, num, held_out, split)


# Prompts.


def few_shot_prompt(
    problem: MultiplicationProblem | SudokuProblem | CountdownProblem, shots: int | None = None, seed: int = 0
) -> str:
    """A prompt in plain text: the rules, `shots` similar solved problems from the larger side of the split, then `problem`.

    Args:
        shots: The number of solved problems, all different; None: that of arXiv 2602.18176 for Sudoku (5) and Countdown (3), and
            none for other tasks.

    Raises:
        ValueError: For negative `shots`.
    """
    shots = problem.shots if shots is None else shots
    if shots < 0:
        raise ValueError(f"`shots` must be at least 0, got {shots}.")
    generator = torch.Generator().manual_seed(seed)
    examples: list[Any] = []
    while len(examples) < shots:
        example = problem.similar(generator)
        if example != problem and example not in examples:
            examples.append(example)
    return "\n\n".join([problem.rules, *(f"{example.question} {example.solution}" for example in examples), problem.question])
