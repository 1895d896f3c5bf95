"""The process that renders templates: its program, its bounds, and the rights of a template in it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from zincmetal.errors import ChatTemplateError
from zincmetal.text.chat import renderer as rendering
from zincmetal.text.chat import resident
from zincmetal.text.chat import sandbox as _render
from zincmetal.text.chat import template as chat
from zincmetal.text.chat.template import CHATML, ChatTemplate

USER = [{"role": "user", "content": "Hi"}]
ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
DOUBLING = "{% set ns = namespace(s='x') %}{% for i in range(99) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}"


def rendered(source: str, **options: Any) -> str:
    return ChatTemplate(source).render(USER, **options)


def program_without(pattern: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Renders with a copy of the program in which the matching lines do nothing."""
    text, n = re.subn(pattern, "pass", Path(_render.__file__).read_text())
    assert n
    (folder / "_render.py").write_text(text)
    monkeypatch.setattr(_render, "__file__", str(folder / "_render.py"))
    monkeypatch.setattr(rendering, "Forked", None)  # Forked would run the original program


# --- bounds


@pytest.fixture
def peak(fresh: rendering.Renderer) -> Iterator[list[int]]:
    """Records the largest resident memory of the rendering process, in bytes."""
    most, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            if child := fresh.child:
                most[0] = max(most[0], resident.resident(child.pid) or 0)

    thread = threading.Thread(target=watch)
    thread.start()
    yield most
    done.set()
    thread.join()


@pytest.mark.parametrize("checked", [True, False])
@pytest.mark.parametrize(
    "source",
    [
        "{{ ('a' * (3 * 10**9)) | length }}",
        "{{ 'a' | center(3000000000) | length }}",
        "{{ [1] * 10**9 }}",
        "{{ '%3000000000d' % 1 }}",
        "{{ '{:>3000000000}'.format(1) }}",
        "{{ ('a' * 10**5).replace('', 'b' * 10**5) }}",
        DOUBLING,
    ],
)
def test_the_parent_bounds_memory_where_the_kernel_does_not(
    source: str, checked: bool, peak: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat, "TIME_LIMIT", 60.0)
    unbounded = r"resource\.setrlimit\(resource\.RLIMIT_AS.*"
    program_without(
        unbounded if checked else rf"(?m){unbounded}|(?<!def )check_size\(.*\)$|raise MemoryError",
        tmp_path,
        monkeypatch,
    )
    with pytest.raises(ChatTemplateError, match="needs more than 512 MiB of memory"):
        rendered(source)
    assert peak[0] <= 512 << 20
    assert rendered("{{ 1 }}") == "1"


@pytest.mark.usefixtures("fresh")
def test_the_parent_bounds_time_where_no_alarm_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "TIME_LIMIT", 0.2)
    program_without(r"signal\.setitimer\(.*", tmp_path, monkeypatch)
    for source in (ENDLESS, "{{ 10 ** (10 ** 10) }}"):
        with pytest.raises(ChatTemplateError, match=r"takes more than 0.2 seconds"):
            rendered(source)
    assert rendered("{{ 1 }}") == "1"


@pytest.mark.parametrize("way", [resident.of_proc, resident.of_ps, resident.resident])
def test_the_memory_of_another_process(way: Any) -> None:
    code = "x = bytearray(b'1') * (64 << 20); print(flush=True); input()"
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert child.stdout is not None
        child.stdout.readline()
        found = way(child.pid)
        if found is None:
            pytest.skip("this system has no such way")
        assert 64 << 20 < found < 200 << 20
    finally:
        child.kill()
        child.communicate()
    assert not way(child.pid)


def test_sizes_that_are_no_sizes_are_left_alone() -> None:
    assert rendered("{{ 3 * 4 }} {{ 'ab' * 2 }} {{ [1] * 2 }} {{ 7 % 4 }} {{ '%d%%' % 5 }}") == "12 abab [1, 1] 3 5%"
    assert rendered("{{ 'a' | center(5) }}|{{ '{:>3}'.format('x') }}|{{ 'a' | replace('a', 'bb') }}") == "  a  |  x|bb"
    assert (
        rendered("{{ 99999999999 * 2 }} {{ 99999999999 % 7 }} {{ '99999999999' ~ 1 }}") == "199999999998 4 999999999991"
    )


@pytest.mark.usefixtures("fresh")
def test_a_process_that_is_killed_is_not_out_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    assert rendered("{{ 1 }}") == "1"
    with monkeypatch.context() as patched:  # the parent looks while the template is rendered
        patched.setattr(rendering, "resident", lambda pid: os.kill(pid, signal.SIGKILL))
        with pytest.raises(ChatTemplateError, match="ended its process with status -9"):
            rendered(ENDLESS)
    assert rendered("{{ 1 }}") == "1"


# --- the sandbox


def test_a_generation_block_is_a_scope() -> None:
    source = "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}"
    assert rendered(source) == "21"
    loop = "{% for m in messages %}{% generation %}{{ loop.index }}{{ m.content }}{% endgeneration %}{% endfor %}"
    assert rendered(loop) == "1Hi"


@pytest.mark.parametrize(
    "source",
    [
        "{% set d = {} %}{% set _ = dict.update(d, {'a': 1}) %}{{ d }}",
        "{% set d = {'a': 1} %}{% set _ = dict.pop(d, 'a') %}{{ d }}",
        "{% set _ = dict.clear(messages[0]) %}",
        "{{ {}.update({'a': 1}) }}",
        "{{ (dict | attr('update'))({}, {'a': 1}) }}",
        "{{ cycler.reset }}{{ cycler.reset(cycler(1)) }}",
        "{{ dict.mro() }}",
        "{{ namespace.mro() }}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
        "{{ namespace(_x=1) }}",
        "{{ ('{0.__class__.__mro__}' | attr('format'))(1) }}",
    ],
)
def test_what_is_given_cannot_be_changed_through_classes(source: str) -> None:
    with pytest.raises(ChatTemplateError, match=r"SecurityError|UndefinedError"):
        rendered(source)


def test_what_templates_do_with_dict_and_namespace() -> None:
    assert rendered("{{ dict(a=1, **{'b': 2}) }} {{ dict([('k', 1)]).k }} {{ dict.fromkeys('ab', 0) }}") == (
        "{'a': 1, 'b': 2} 1 {'a': 0, 'b': 0}"
    )
    assert rendered("{% set ns = namespace(self=1, a=2) %}{% set ns.b = 3 %}{{ ns.self + ns.a + ns.b }}") == "6"


# --- jinja2


SLOW_JINJA = """
import sys, time
time.sleep(0.8)
sys.path.remove({folder!r})
del sys.modules["jinja2"]
import jinja2
"""


def test_the_import_of_jinja_takes_no_time_of_a_template(
    fresh: rendering.Renderer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "jinja2.py").write_text(SLOW_JINJA.format(folder=str(tmp_path)))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(chat, "TIME_LIMIT", 0.3)
    assert rendered("{{ 1 }}") == "1"


def test_an_old_jinja_is_refused(fresh: rendering.Renderer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "jinja2").mkdir()
    for version in ("3.1.5", "2.11", "3.1.5.post1"):
        (tmp_path / "jinja2" / "__init__.py").write_text(f"__version__ = {version!r}")
        monkeypatch.syspath_prepend(str(tmp_path))
        with pytest.raises(ChatTemplateError, match=r"jinja2 3\.1\.6 or later.*pip install"):
            rendered("x")


# --- applications that are no Python


APPLICATION = """
import os, sys
with open({starts!r}, "a") as f: f.write("started\\n")
if os.path.getsize({starts!r}) > 40: sys.exit(1)  # or it would start itself forever
{prelude}
from zincmetal.text.chat.template import CHATML, ChatTemplate
for n in range(2):
    print(ChatTemplate(CHATML).render([{{"role": "user", "content": "hi"}}]), flush=True)
"""


def run_application(folder: Path, name: str, prelude: str) -> tuple[str, int]:
    """Runs an application whose executable ignores its arguments; returns its output and how often it started."""
    executable, starts = folder / name, folder / "starts"
    executable.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{folder / "app.py"}"\n')
    executable.chmod(0o755)
    (folder / "app.py").write_text(
        APPLICATION.format(starts=str(starts), prelude=prelude.format(executable=str(executable)))
    )
    env = {"PYTHONPATH": ":".join(sys.path), "PATH": "/usr/bin:/bin"}
    done = subprocess.run([str(executable)], env=env, capture_output=True, text=True, timeout=120)
    return done.stdout + done.stderr, len(starts.read_text().splitlines())


PROMPT = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n\n"


@pytest.mark.parametrize(
    ("name", "prelude", "n"),
    [
        ("app", "sys.frozen, sys.executable = True, {executable!r}", 1),
        ("app", "sys.executable = {executable!r}", 1),
        ("python3", "sys.frozen, sys.executable = True, {executable!r}", 1),
        ("app", "sys.executable = ''", 1),
        ("app", "sys.executable = None", 1),
        # An executable named like Python is tried once. It does not answer as Python does, so it is not used.
        ("python3", "if os.path.getsize({starts!r}) > 10: sys.exit('no')\nsys.executable = {executable!r}", 2),
    ],
)  # fmt: skip
def test_an_application_does_not_start_itself_for_each_chat(name: str, prelude: str, n: int, tmp_path: Path) -> None:
    prelude = prelude.replace("{starts!r}", repr(str(tmp_path / "starts")))
    assert run_application(tmp_path, name, prelude) == (PROMPT * 2, n)


def test_an_application_may_name_a_python(tmp_path: Path) -> None:
    named = "sys.frozen, sys.executable = True, {executable!r}\nos.environ['ZINCMETAL_PYTHON'] = %r\n"
    check = "import zincmetal.text.chat.renderer as r\nr.Forked.__init__ = None\n"
    assert run_application(tmp_path, "app", named % sys.executable + check) == (PROMPT * 2, 1)


@pytest.mark.parametrize(("named", "why"), [("/bin/cat", "is not a Python"), ("/no/such/python", "No such file")])
def test_a_named_python_that_is_none(
    named: str, why: str, fresh: rendering.Renderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZINCMETAL_PYTHON", named)
    with pytest.raises(ChatTemplateError, match=why):
        rendered("x")


def test_a_program_that_never_answers_is_not_waited_for(
    fresh: rendering.Renderer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    silent = tmp_path / "python3"
    silent.write_text("#!/bin/sh\nexec sleep 600\n")
    silent.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(silent))
    monkeypatch.setattr(rendering, "START_LIMIT", 0.2)
    monkeypatch.setattr(rendering, "Forked", lambda settings: rendering.spawn(str(silent), settings))
    with pytest.raises(ChatTemplateError, match="ZINCMETAL_PYTHON"):
        rendered("x")


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_a_forked_process_has_the_same_bounds(fresh: rendering.Renderer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    ballast = bytearray(b"1") * (600 << 20)  # the parent's memory: more than the template may have
    idle = threading.Thread(target=time.sleep, args=(0.01,))
    idle.start()
    assert rendered(CHATML) == rendered(CHATML)
    assert isinstance(fresh.child, rendering.Forked)
    with pytest.raises(ChatTemplateError, match="needs more than 512 MiB"):
        rendered(DOUBLING)
    monkeypatch.setattr(chat, "TIME_LIMIT", 0.3)
    with pytest.raises(ChatTemplateError, match="takes more than"):
        rendered(ENDLESS)
    assert rendered("{{ 1 }}") == "1"
    idle.join()
    assert len(ballast)
