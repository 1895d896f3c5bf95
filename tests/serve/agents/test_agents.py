"""Coding agents, as their makers ship them, edit a file in three turns against the server with a scripted model.

They are set up as ``zincmetal launch`` does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest

from support.coding_agents import AGENTS, PROGRAMS, TEMPLATE, Script, start
from support.running_server import RunningServer
from support.scripted import ScriptedBackend, ScriptedModels, scripted
from zincmetal.cli import launch
from zincmetal.engine.sequence import common
from zincmetal.serve.serving import Serving

WINDOW = 400_000  # a token is a byte here
MOST_EXTRA = 64  # tokens of a turn that are computed although they were before

pytestmark = pytest.mark.skipif(not PROGRAMS, reason="needs the agents: make test-agents")


@dataclass
class Run:
    """What came of a run."""

    script: Script
    backend: ScriptedBackend
    file: Path
    output: str
    status: int


@pytest.fixture(
    params=[(a, t) for a in AGENTS for t in ("", "<think>Let me see.</think>")], ids=lambda p: f"{p[0]}{p[1][:7]}"
)
def finished(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Run]:
    """Returns a run that has ended, of each agent, with and without reasoning."""
    name, thoughts = request.param
    work, home = tmp_path / "work", tmp_path / "home"
    work.mkdir()
    home.mkdir()
    file = work / "a.txt"
    file.write_text("hello world\n")
    script = Script(AGENTS[name].calls(str(file)), thoughts)
    backend = scripted(tmp_path, script, n_ctx=WINDOW, template=TEMPLATE)
    with RunningServer(Serving(ScriptedModels([backend]))) as server:
        setup = launch.AGENTS[name](launch.Served(server.url, "scripted", WINDOW))
        done = start(setup.program, AGENTS[name].words(setup.arguments), work, home, setup.environment)
        yield Run(script, backend, file, done.stdout + done.stderr, done.returncode)


def test_a_file_is_edited_in_three_turns_and_each_turn_computes_what_is_new(finished: Run) -> None:
    run = finished
    assert run.status == 0, run.output
    assert run.file.read_text() == "hello zinc\n"
    assert "It is done." in run.output
    turns, tokenizer = run.script.turns, run.backend.text.tokenizer
    assert len(turns) == 4, run.output
    for (ids, answer), (more, _) in pairwise(turns):
        known = [*ids, *tokenizer.encode(answer, False, True, add_eos=False)]
        assert len(known) - common(known, more) <= MOST_EXTRA, tokenizer.decode(more[common(known, more) - 80 :])
    assert run.backend.running == []
