"""The changes of a module that become mutants (make mutants-engine)."""

from __future__ import annotations

import ast
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from engine_mutants import ENGINE, FILES, TESTS, exchange, in_fork, listed, mutants

BODY = "def f(x):\n    {}\n"
CHANGES = {
    "x.a = 1": {"deleted": "pass"},
    "x += 1": {"deleted": "pass"},
    "x.go()": {"deleted": "pass"},
    "return min(x, 3)": {"deleted": "pass", "max(x, 3)": "return max(x, 3)"},
    "y = x[0] if x else 2": {"not (x)": "y = x[0] if not x else 2"},
    "y = [a for a in x if a]": {"not (a)": "y = [a for a in x if not a]"},
    "y = x < 3": {"x < 3 + 1": "y = x < 3 + 1", "x < 3 - 1": "y = x < 3 - 1"},
    "y = x == 3": {},
    "'a docstring'": {},
    "_log.info(x)": {},
    "assert x": {},
}


@pytest.mark.parametrize("line", CHANGES)
def test_changes_of_a_line(line: str) -> None:
    found = {m.change: ast.unparse(m.tree()) for m in mutants("a.py", BODY.format(line) + "    z = 0\n")}
    assert found == {change: BODY.format(text) + "    z = 0" for change, text in CHANGES[line].items()}


def test_every_mutant_is_a_program_of_its_own() -> None:
    for module in ("pages.py", "flight.py"):
        text = (ENGINE / module).read_text("utf-8")
        same = ast.unparse(ast.parse(text))
        texts = [same, *(ast.unparse(mutant.tree()) for mutant in mutants(module, text))]
        assert len(texts) > 10
        assert all(compile(each, module, "exec") for each in texts)
        assert same not in texts[1:]


def test_listed_survivors_are_mutants_and_their_tests_are_there() -> None:
    survivors = set(listed())
    for module in {module for module, _, _ in survivors}:
        found = {(module, m.line, m.change) for m in mutants(module, (ENGINE / module).read_text("utf-8"))}
        assert {key for key in survivors if key[0] == module} <= found
    assert all((Path(TESTS) / "engine" / file).exists() for file in FILES)


def test_a_mutant_lives_in_its_fork() -> None:
    from zincmetal.engine.pages import PagePool

    def free(tell: Callable[[str], None]) -> int:
        (mutant,) = (m for m in mutants("pages.py", text) if m.line == line and m.change == "deleted")
        exchange(mutant)
        tell(str(PagePool.needed(129)))
        return 3

    text = (ENGINE / "pages.py").read_text("utf-8")
    (line,) = (at.strip() for at in text.split("\n") if at.strip().startswith("return -(-"))
    said, status = in_fork(free)
    assert (said.strip(), os.waitstatus_to_exitcode(status)) == ("None", 3)
    assert PagePool.needed(129) == 3


def test_an_error_in_a_fork_ends_the_fork() -> None:
    def fails(tell: Callable[[str], None]) -> int:
        tell("begun")
        raise ValueError("no function is there")

    said, status = in_fork(fails)
    assert (said.strip(), os.waitstatus_to_exitcode(status)) == ("begun", 255)
