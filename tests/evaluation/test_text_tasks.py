"""The generators and checkers of the text tasks agree with brute force, and no checker takes what is nearly right."""

from __future__ import annotations

import ast
import itertools
import operator
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusers_infogain.choices import SPLITS
from diffusers_infogain.evaluation import text_tasks
from diffusers_infogain.evaluation.text_tasks import CountdownProblem, MultiplicationProblem, SudokuProblem

SAMPLERS = {
    "multiplication": text_tasks.sample_multiplications,
    "sudoku": text_tasks.sample_sudokus,
    "countdown": text_tasks.sample_countdowns,
}
factors = st.integers(0, text_tasks.MAX_FACTOR)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# All tasks.


@pytest.mark.parametrize("sample", SAMPLERS.values(), ids=SAMPLERS)
def test_a_seed_means_the_same_problems(sample):
    assert sample(20, seeded(3)) == sample(20, seeded(3))
    assert sample(20, seeded(3)) != sample(20, seeded(4))


@pytest.mark.parametrize("sample", SAMPLERS.values(), ids=SAMPLERS)
def test_the_split_is_disjoint_and_one_in_eight_is_held_out(sample):
    trained, held_out = set(sample(300, seeded(), held_out=False)), set(sample(300, seeded(), held_out=True))
    assert not trained & held_out
    assert {problem.held_out for problem in trained} == {False}
    assert {problem.held_out for problem in held_out} == {True}
    share = sum(problem.held_out for problem in sample(1000, seeded())) / 1000
    assert 0.08 < share < 0.18


@pytest.mark.parametrize("sample", SAMPLERS.values(), ids=SAMPLERS)
def test_problems_to_choose_on_to_report_and_for_the_final_table_are_disjoint_thirds(sample):
    parts = {split: set(sample(300, seeded(), split=split)) for split in SPLITS}
    for split, problems in parts.items():
        assert {problem.split for problem in problems} == {split}
    assert not any(parts[a] & parts[b] for a, b in itertools.combinations(SPLITS, 2))
    drawn = [problem.split for problem in sample(900, seeded())]
    assert all(0.28 < drawn.count(split) / 900 < 0.39 for split in SPLITS)
    assert {problem.split for problem in sample(60, seeded(), held_out=True)} == set(SPLITS)
    with pytest.raises(ValueError, match="`split` must be one of choose, report, final, got 'test'"):
        sample(1, seeded(), split="test")


def test_the_split_is_fixed():
    """It is part of what results mean, so that it may not depend on the process or the version."""
    pairs = [(a, b) for a in range(5) for b in range(5) if MultiplicationProblem(a, b).held_out]
    assert pairs == [(0, 1), (1, 0), (1, 4), (4, 1)]
    assert [MultiplicationProblem(3, b).split for b in range(5)] == ["report", "final", "final", "report", "final"]
    assert SudokuProblem("12__3___________").split == "report"


def test_the_split_knows_no_order():
    for a, b in itertools.combinations(range(text_tasks.MAX_FACTOR + 1), 2):
        one, other = MultiplicationProblem(a, b), MultiplicationProblem(b, a)
        assert (one.held_out, one.split) == (other.held_out, other.split)
    problems = [CountdownProblem(order, 24) for order in itertools.permutations((3, 3, 8, 8))]
    assert len({(problem.held_out, problem.split) for problem in problems}) == 1


@pytest.mark.parametrize("sample", SAMPLERS.values(), ids=SAMPLERS)
def test_a_negative_number_of_problems_is_an_error(sample):
    with pytest.raises(ValueError, match=r"`num` must be an integer >= 0, got -1"):
        sample(-1, seeded())
    assert sample(0, seeded()) == []


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        ("Answer: 1 + 2", "1 + 2"),
        ("  1 + 2\n", "1 + 2"),
        ("Puzzle: 1\nAnswer: 3\n\nPuzzle: 2\nAnswer: 4\nThat is all.", "4"),
        ("So the answer is 12.", "So the answer is 12"),
        ("**Answer:** 3 * 5", "3 * 5"),
        ("I see.\n\n**Answer: 3 * 5.**\n", "3 * 5"),
        ("Answer:\n`3 * 5`\nbecause", "3 * 5"),
        (r"Answer: $\boxed{3 * (5 - 1)}$.", "3 * (5 - 1)"),
        ("**Answer**: 3 * 5", "3 * 5"),
        ("answer: 3 * 5", "3 * 5"),
        (r"Answer: \(3 * 5\)", "3 * 5"),
        ("Answer:\n```\n3 * 5\n```\n", "3 * 5"),
        ("Answer:\r\n3 * 5\r\n", "3 * 5"),
        ("3 * 5", "3 * 5"),
        ("Answer:", ""),
    ],
)
def test_final_answer(reply, answer):
    assert text_tasks.final_answer(reply) == answer


def test_a_base_model_goes_on_with_other_problems():
    assert text_tasks.first_line(" 1234341221434321\n\nPuzzle: 12__\nAnswer: 2143") == "1234341221434321"
    assert text_tasks.first_line("\n3 * 5.\nThe end") == "3 * 5"


# Multiplication.


def test_equations_have_fixed_widths():
    assert text_tasks.equation(7, 12) == "07*12=0001010100"
    assert text_tasks.equation(31, 31) == "31*31=1111000001"


@given(a=factors, b=factors, product=st.integers(0, 2**text_tasks.PRODUCT_BITS - 1))
def test_an_equation_holds_only_with_its_product(a, b, product):
    text = f"{a:02d}*{b:02d}={product:010b}"
    assert text_tasks.check_equation(text) == (product == a * b)
    assert text_tasks.check_equation(text_tasks.equation(a, b))


@given(a=factors, b=factors, data=st.data())
def test_a_changed_character_makes_another_equation_or_none(a, b, data):
    text = text_tasks.equation(a, b)
    place = data.draw(st.integers(0, len(text) - 1))
    other = data.draw(st.sampled_from("0123456789*=_ ").filter(lambda c: c != text[place]))
    changed = text[:place] + other + text[place + 1 :]
    zero_on_the_other_side = changed[:5].count("*") == 1 and changed[6:] == "0" * 10 and a * b == 0
    assert not text_tasks.check_equation(changed) or zero_on_the_other_side


def test_another_equation_of_the_same_product_answers_another_problem():
    text, others = text_tasks.equation(0, 5), []
    for place in range(len(text)):
        others += [text[:place] + other + text[place + 1 :] for other in "0123456789*=_ " if other != text[place]]
    equations = [other for other in others if text_tasks.check_equation(other)]
    assert len(equations) > 9  # 0 times anything else
    assert not any(MultiplicationProblem(0, 5).check(other) for other in equations)


@pytest.mark.parametrize(
    "text",
    [
        "7*12=0001010100",
        "07*12=1010100",
        "07*12=00001010100",
        "007*12=0001010100",
        " 07*12=0001010100",
        "07*12=0001010100 ",
        "07*12=0001010100\n",
        "M07*12=0001010100",
        "07*12=0001010101",
        "07*12=0000000084",
        "07*12=000101010_",
        "07×12=0001010100",
        "٠7*12=0001010100",
        "32*02=0001000000",
        "",
    ],
)
def test_what_only_looks_like_an_equation_is_wrong(text):
    assert not text_tasks.check_equation(text)


def test_every_factorization_of_a_given_product_is_right_and_no_other_pair():
    problem = MultiplicationProblem(6, 10, given="product")
    assert problem.template == "__*__=0000111100"
    right = {(a, b) for a in range(32) for b in range(32) if problem.check(text_tasks.equation(a, b))}
    assert right == {(a, b) for a in range(32) for b in range(32) if a * b == 60}
    assert len(right) > 2


def test_the_answer_keeps_what_is_given():
    assert MultiplicationProblem(6, 10).template == "06*10=__________"
    assert not MultiplicationProblem(6, 10).check(text_tasks.equation(10, 6))
    nothing = MultiplicationProblem(6, 10, given="nothing")
    assert nothing.template == "__*__=__________"
    assert nothing.check(text_tasks.equation(3, 4))
    assert not nothing.check("03*04=0000001101")


def test_factors_and_given_out_of_range_are_errors():
    with pytest.raises(ValueError, match=r"`a` must lie in 0 to 31, got 32"):
        text_tasks.equation(32, 1)
    with pytest.raises(ValueError, match=r"`b` must lie in 0 to 31, got -1"):
        MultiplicationProblem(1, -1)
    with pytest.raises(ValueError, match=r"`given` must be one of factors, product, nothing, got 'all'"):
        MultiplicationProblem(1, 1, given="all")


# Sudoku.


def valid_by_hand(cells: str) -> bool:
    """The rule spelled out pair by pair: no two equal digits in a row, a column or a box."""
    peers = [
        (i, j)
        for i, j in itertools.combinations(range(16), 2)
        if i // 4 == j // 4 or i % 4 == j % 4 or (i // 8 == j // 8 and i % 4 // 2 == j % 4 // 2)
    ]
    return all(cells[i] != cells[j] for i, j in peers)


def complete_by_search(template: str) -> set[str]:
    """Backtracking, cell by cell."""
    place = template.find("_")
    if place < 0:
        return {template} if valid_by_hand(template) else set()
    return set().union(
        *(complete_by_search(template[:place] + digit + template[place + 1 :]) for digit in possible(template, place))
    )


def possible(template: str, place: int) -> list[str]:
    def clash(i: int) -> bool:
        return i // 4 == place // 4 or i % 4 == place % 4 or (i // 8 == place // 8 and i % 4 // 2 == place % 4 // 2)

    return [digit for digit in "1234" if all(template[i] != digit for i in range(16) if clash(i))]


def test_there_are_288_grids_and_search_finds_the_same():
    grids = text_tasks.sudoku_grids()
    assert len(grids) == len(set(grids)) == 288
    assert list(grids) == sorted(grids)
    assert set(grids) == complete_by_search("_" * 16)


@given(st.text(alphabet="1234", min_size=16, max_size=16))
def test_random_digits_are_checked_as_by_hand(cells):
    assert text_tasks.check_grid(cells) == valid_by_hand(cells)


@given(st.sampled_from(text_tasks.sudoku_grids()), st.integers(0, 15), st.sampled_from("01234569_ "))
def test_a_changed_cell_is_wrong(grid, place, digit):
    changed = grid[:place] + digit + grid[place + 1 :]
    assert text_tasks.check_grid(changed) == (changed == grid)


@pytest.mark.parametrize("form", ["{}1", " {}", "{}\n", "S{}", "{:.15}", ""])
def test_extra_and_missing_characters_are_wrong(form):
    assert not text_tasks.check_grid(form.format(text_tasks.sudoku_grids()[0]))


def test_latin_squares_with_wrong_boxes_are_wrong():
    assert not text_tasks.check_grid("1234234134124123")


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10_000), st.integers(0, 15))
def test_solutions_are_what_search_finds_and_keep_the_clues(seed, clues):
    (problem,) = text_tasks.sample_sudokus(1, seeded(seed), clues=(clues, clues))
    assert 16 - problem.template.count("_") == clues
    assert set(problem.solutions) == complete_by_search(problem.template)
    right = [grid for grid in text_tasks.sudoku_grids() if problem.check(grid)]
    assert tuple(right) == problem.solutions
    assert right


def test_a_valid_grid_that_drops_a_clue_is_wrong():
    problem = SudokuProblem("1" + "_" * 15)
    assert problem.check("1234341221434321")
    assert not any(problem.check(grid) for grid in text_tasks.sudoku_grids() if grid[0] != "1")


def test_sudoku_arguments_out_of_range_are_errors():
    for clues in ((5, 4), (-1, 3), (0, 16)):
        with pytest.raises(ValueError, match=r"`clues` must be two ascending numbers from 0 to 15"):
            text_tasks.sample_sudokus(1, seeded(), clues=clues)
    with pytest.raises(ValueError, match=r"`held_out` must be None"):
        text_tasks.sample_sudokus(1, seeded(), clues=(0, 0), held_out=True)
    with pytest.raises(ValueError, match=r"`template` must be 16 characters out of 1234_, got '12'"):
        SudokuProblem("12")


# Countdown.

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def python_value(node: ast.expr) -> Fraction:
    """Python's own reading of an expression."""
    if isinstance(node, ast.Constant):
        return Fraction(node.value)
    assert isinstance(node, ast.BinOp)
    return OPERATORS[type(node.op)](python_value(node.left), python_value(node.right))


def constants_of(text: str) -> list[int]:
    return [node.value for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Constant)]


expressions = st.recursive(
    st.integers(0, 30).map(str),
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["+", "-", "*", "/", " + ", " - ", " * ", " / "]), inner).map("".join),
        inner.map("({})".format),
    ),
    max_leaves=8,
)


@given(expressions)
def test_expressions_are_read_as_python_reads_them(text):
    try:
        expected = python_value(ast.parse(text, mode="eval").body)
    except ZeroDivisionError:
        with pytest.raises(ValueError, match="`text` must be"):
            text_tasks.evaluate_expression(text)
        return
    value, numbers = text_tasks.evaluate_expression(text)
    assert value == expected
    assert sorted(numbers) == sorted(constants_of(text))


@pytest.mark.parametrize(
    "text",
    ["", " ", "()", "1 +", "+ 1", "-1", "1 - -1", "1 2", "07", "1.5", "1e3", "2 ** 3", "7 // 2", "(1", "1)", "2(3)", "1 + x",
     "1/0", "5 / (2 - 2)", "1 + 1;", "1\n+ 1", "１", "²", "1_0", "__import__('os')", "(" * 5000, "1 = 1"],
)  # fmt: skip
def test_what_is_no_expression_is_an_error(text):
    with pytest.raises(ValueError, match="`text` must be an expression"):
        text_tasks.evaluate_expression(text)


def reachable(numbers: tuple[int, ...]) -> set[Fraction]:
    """Every value of an expression with each number at most once."""
    values = {Fraction(n) for n in numbers}
    for i, j in itertools.permutations(range(len(numbers)), 2):
        rest = [n for k, n in enumerate(numbers) if k not in (i, j)]
        x, y = numbers[i], numbers[j]
        for result in (x + y, x - y, x * y, Fraction(x, 1) / y if y else None):
            if result is not None:
                values |= reachable((*rest, Fraction(result)))
    return values | {
        v for k in range(len(numbers)) for v in (reachable(numbers[:k] + numbers[k + 1 :]) if len(numbers) > 1 else ())
    }


def test_problems_are_solvable_and_their_solutions_right():
    for count in (2, 3, 4, 6):
        problems = text_tasks.sample_countdowns(100, seeded(count), count=count, max_number=30, max_target=90)
        assert len(problems) == 100
        for problem in problems:
            assert len(problem.numbers) == count
            assert max(problem.numbers) <= 30
            assert 1 <= problem.target <= 90
            assert problem.target not in problem.numbers
            assert problem.check(problem.solution)
            assert problem.check(f"{problem.solution} = {problem.target}")
            value = python_value(ast.parse(problem.solution, mode="eval").body)
            assert value == problem.target


def test_brute_force_reaches_the_targets():
    for problem in text_tasks.sample_countdowns(15, seeded(), count=3):
        assert problem.target in reachable(problem.numbers)


@settings(deadline=None, max_examples=200)
@given(expressions, st.lists(st.integers(1, 30), min_size=1, max_size=8), st.integers(-50, 200))
def test_right_is_the_target_from_the_numbers_and_nothing_else(text, numbers, target):
    problem = CountdownProblem(tuple(numbers), target)
    constants = constants_of(text)
    try:
        hits = python_value(ast.parse(text, mode="eval").body) == target
    except ZeroDivisionError:
        hits = False
    assert problem.check(text) == (hits and all(constants.count(c) <= numbers.count(c) for c in constants))


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("8 / (3 - 8 / 3)", True),
        ("8/(3-8/3)", True),
        (" ( 8 / ( 3 - 8 / 3 ) ) ", True),
        ("8 / (3 - 8 / 3) = 24", True),
        ("3 * 8", True),
        ("8 / (3 - 8 / 3) = 2", False),
        ("8 / (3 - 8 / 3) = 024", False),
        ("8 / (3 - 8 / 3) = 24 = 24", False),
        ("8 / (3 - 8 / 3) =", False),
        ("24", False),
        ("8 + 8 + 8", False),
        ("3 * 8 + 0", False),
        ("03 * 8", False),
        ("Answer: 3 * 8", False),
        ("3 * 8.", False),
        ("3 * 8\n", False),
        ("3 * 8 * 1", False),
        ("3 * 8 (I think)", False),
        ("", False),
    ],
)
def test_countdown_answers(answer, right):
    assert CountdownProblem((3, 3, 8, 8), 24).check(answer) is right


def test_a_number_in_another_number_is_not_that_number():
    assert not CountdownProblem((12, 3), 5).check("2 + 3")
    assert not CountdownProblem((2, 3), 15).check("12 + 3")
    assert not CountdownProblem((1, 2, 3), 15).check("12 + 3")


def test_countdown_arguments_out_of_range_are_errors():
    for name, value in (("count", 1), ("max_number", 1), ("max_target", 9)):
        with pytest.raises(ValueError, match=rf"`{name}` must be an integer >= \d+, got {value}"):
            text_tasks.sample_countdowns(1, seeded(), **{name: value})
    with pytest.raises(ValueError, match=r"`numbers` must be at least one positive integer, got \(3, 0\)"):
        CountdownProblem((3, 0), 3)


# Prompts.


def read_examples(prompt: str, *fields: str) -> list[list[str]]:
    """The fields of every block behind the rules."""
    blocks = prompt.split("\n\n")[1:]
    for block in blocks:
        assert [line.partition(":")[0] for line in block.splitlines()] == list(fields)
    return [[line.partition(":")[2].strip() for line in block.splitlines()] for block in blocks]


@pytest.mark.parametrize("held_out", [False, True])
def test_few_shot_sudoku_shows_solved_problems_of_the_larger_side(held_out):
    for problem in text_tasks.sample_sudokus(3, seeded(), held_out=held_out):
        *examples, (last, empty) = read_examples(text_tasks.few_shot_prompt(problem), "Puzzle", "Answer")
        assert (last, empty) == (problem.template, "")
        assert len(examples) == 5
        for template, answer in examples:
            example = SudokuProblem(template)
            assert example.check(answer)
            assert len(example.solutions) == 1
            assert not example.held_out
            assert example != problem


def test_few_shot_countdown_shows_solved_problems_of_the_larger_side():
    for problem in text_tasks.sample_countdowns(3, seeded(), count=3):
        blocks = read_examples(text_tasks.few_shot_prompt(problem), "Numbers", "Target", "Answer")
        assert len(blocks) == 4
        for numbers, target, answer in blocks[:-1]:
            example = CountdownProblem(tuple(map(int, numbers.split(", "))), int(target))
            assert example.check(answer)
            assert len(example.numbers) == 3
            assert not example.held_out
        assert blocks[-1] == [", ".join(map(str, problem.numbers)), str(problem.target), ""]


def test_few_shot_prompts_are_seeded_and_end_with_the_question():
    for problem in (
        *text_tasks.sample_sudokus(1, seeded()),
        *text_tasks.sample_countdowns(1, seeded()),
        *text_tasks.sample_multiplications(1, seeded(), given="product"),
    ):
        build = text_tasks.few_shot_prompt
        assert build(problem, 2) == build(problem, 2, seed=0) != build(problem, 2, seed=1)
        assert build(problem, shots=0) == f"{problem.rules}\n\n{problem.question}"
        assert build(problem).endswith("\nAnswer:")
        with pytest.raises(ValueError, match="`shots` must be at least 0, got -1"):
            build(problem, shots=-1)


def test_the_multiplication_prompt_holds_the_template_and_its_examples_have_as_much_given():
    problem = MultiplicationProblem(7, 12)
    assert text_tasks.few_shot_prompt(problem).endswith(f"Equation: {problem.template}\nAnswer:")
    *examples, _ = read_examples(text_tasks.few_shot_prompt(problem, shots=3), "Equation", "Answer")
    assert len(examples) == 3
    for template, answer in examples:
        assert text_tasks.check_equation(answer)
        assert template == answer.partition("=")[0] + "=" + problem.template.partition("=")[2]
