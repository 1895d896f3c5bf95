"""The pages say what the code does: variables, rooms, paths, quoted lines, limits, examples."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest

import zincmetal
from support.scripted import ScriptedModels
from zincmetal import settings
from zincmetal.cli import main
from zincmetal.cli.arguments import Parser
from zincmetal.gguf import header, quants
from zincmetal.text.chat import template

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "python" / "zincmetal"
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
SOURCES = ("python", "csrc", "kernels", "cmake", "tests", "bench")
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))


def read(path: str) -> str:
    return (ROOT / path).read_text("utf-8")


def first_cells(page: str) -> list[str]:
    """The first cell of every row of a page's tables."""
    return re.findall(r"^\| ([^|]+) \|", read(page), re.MULTILINE)


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


# ---- facts that the code has too -------------------------------------------------------------------------------------


def test_every_variable_of_the_code_is_documented_and_no_other():
    pattern = re.compile(r"\bZINCMETAL_[A-Z0-9_]*[A-Z0-9]")
    files = [f for folder in SOURCES for f in (ROOT / folder).rglob("*") if f.suffix in TEXT and f != Path(__file__)]
    used = {found for f in [ROOT / "CMakeLists.txt", *files] for found in pattern.findall(f.read_text("utf-8"))}
    listed = [found for cell in first_cells("docs/environment.md") for found in pattern.findall(cell)]
    assert set(listed) == used
    assert len(listed) == len(set(listed))


TEXT = {".py", ".pyi", ".cpp", ".h", ".mm", ".cu", ".metal", ".cmake", ".txt", ".sh"}


def test_the_variables_stand_in_the_order_of_the_settings():
    rows = re.findall(r"^\| `(\w+)` \| [^|]+ \| [^|]+ \| [^|]+ \|$", read("docs/environment.md"), re.MULTILINE)
    assert rows == [variable.name for variable in settings.ALL]


def test_the_rooms_are_the_folders_and_the_order_is_the_linters():
    table = read("docs/architecture.md").split("## The rooms")[1].split("\n## ")[0]
    lines = [re.findall(r"`(\w+)(?:/|\.py)`", cell) for cell in re.findall(r"^\| (`[^|]+) \|", table, re.MULTILINE)]
    rooms = {f.stem for f in PACKAGE.iterdir() if (f / "__init__.py").exists() or f.suffix == ".py"}
    doors = {"__init__", "__main__", "generate"}  # and no room
    assert {room for line in lines for room in line} == rooms - doors
    layers = re.search(r"^layers = \[\n(.*?)^\]", read("pyproject.toml"), re.MULTILINE | re.DOTALL)
    assert layers
    assert lines == [re.findall(r"\w+", line) for line in re.findall(r'"([^"]+)"', layers[1])]


def test_every_metal_source_has_its_family():
    sources = re.findall(
        r"`(kernels/\w+\.metal)`", read("docs/architecture.md").split("| family |")[1].split("\n## ")[0]
    )
    assert sorted(sources) == sorted(name(path) for path in (ROOT / "kernels").glob("*.metal"))


def test_the_pages_list_the_quant_types():
    listed = read("docs/models.md").split("Weights are of these types")[1].split("Head sizes")[0]
    assert sorted(re.findall(r"\w*\d\w*", listed)) == sorted(t.name.upper() for t in quants.SUPPORTED)
    assert f"Weights of [{len(quants.SUPPORTED)} types]" in read("README.md")


def test_the_command_page_has_every_command_and_every_option():
    page = read("docs/command.md")
    assert re.findall(r"^\| \[`(\w+)`\]", page, re.MULTILINE) == [command.name for command in main.COMMANDS]
    for command in main.COMMANDS:
        parser = command.prepare(Parser(command.name, ""))
        help_text = "".join(p.format_help().split("\nexamples")[0] for p in (parser, *parser.inner.values()))
        options = set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", help_text)) - {"-h", "--help"}
        section = re.search(rf"^## {command.name}\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)
        assert section, command.name
        assert not [option for option in options if not re.search(rf"`{option}(?: [^`]+)?`", page)], command.name
        rows = re.findall(r"^\| (`-[^|]+) \|", section[1], re.MULTILINE)
        shown = {option for row in rows for option in re.findall(r"`(--?[a-z][\w-]*)", row)}
        assert shown <= options, command.name


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_that_the_pages_show_are_commands(page: Path):
    known = {command.name for command in main.COMMANDS}
    shown = re.findall(r"(?:^|[`/])zincmetal ([a-z]+)\b", page.read_text("utf-8"), re.MULTILINE)
    assert not [command for command in shown if command not in known]


def test_limits_in_the_threat_model():
    page = read("SECURITY.md")
    assert f"| a string in a header | {header.MAX_STRING >> 20} MiB |" in page
    assert f"| an array in a header | {header.MAX_ARRAY:,} elements |" in page
    assert f"| the dimensions of a tensor | {header.MAX_DIMS} |" in page
    assert f"| the time to compile and render a template | {template.TIME_LIMIT:g} seconds |" in page
    assert f"| the memory of the template process | {template.MEMORY_LIMIT >> 20} MiB |" in page
    assert f"| the text that a template writes | {template.LONGEST:,} characters |" in page


def test_limits_of_the_server_in_the_threat_model():
    serving = pytest.importorskip("zincmetal.serve.serving")
    page, limits = read("SECURITY.md"), serving.Limits()
    assert f"| a body | {limits.body >> 20} MiB, or `--max-body` |" in page
    assert f"| nested JSON | {limits.depth} levels |" in page
    assert f"| the head of a request | {limits.headers >> 10} KiB, {limits.header_seconds:g} seconds |" in page
    assert f"| {limits.body_seconds:g} seconds, {limits.read_seconds:g} between two pieces |" in page
    assert f"| an answer that lies unread | {limits.write_seconds:g} seconds |" in page
    assert f"| connections | {limits.connections} |" in page
    assert f"| answers to one request (`n`) | {limits.choices} |" in page


#: The chat page and its files, names for clients that ask for others, and work with files that no option allows yet.
UNSAID_ROUTES = {"/", "/page/{name}", "/api/hello", "/v1/health", "/models"}


def test_the_server_page_has_every_route_and_no_other():
    app = pytest.importorskip("zincmetal.serve.app")
    serving = app.Serving(ScriptedModels([]))
    routes = {re.sub(r"{(\w+):path}", r"{\1}", route.path) for route in app.make_app(serving).routes}
    section = read("docs/server.md").split("## What it answers")[1].split("\n\n")[1]
    assert set(re.findall(r"`(?:[A-Z]+ )?(/[^`]*)`", section)) == routes - UNSAID_ROUTES


def test_the_api_page_has_every_public_name():
    shown = set(re.findall(r"^::: zincmetal\.(\w+)$", read("docs/api.md"), re.MULTILINE))
    public = {n for n in zincmetal.__all__ if not n.startswith("_") and not n.endswith("Error")}
    assert public <= shown
    assert "errors" in shown  # all of them


@pytest.mark.parametrize("page", ["README.md", "docs/index.md"])
def test_the_first_example_gives_what_the_page_says(page: str, smollm2: Path):
    example = re.search(r'm\.generate\("([^"]+)", max_tokens=(\d+)\)\.text\n(.+)\n', read(page))
    assert example
    with zincmetal.load(smollm2, device="cpu") as model:
        assert model.generate(example[1], max_tokens=int(example[2])).text == ast.literal_eval(example[3])


def test_one_version_everywhere():
    version = re.search(r'^version = "(.+)"$', read("pyproject.toml"), re.MULTILINE)
    assert version
    log = read("CHANGELOG.md")
    released = re.findall(r"^## \[(.+)\] - (\d{4}-\d\d-\d\d)$", log, re.MULTILINE)
    assert released[0][0] == version[1]
    assert re.findall(r"^## \[(.+?)\]", log, re.MULTILINE)[0] == "Unreleased"
    citation = read("CITATION.cff")
    assert f"version: {version[1]}\n" in citation
    assert f'date-released: "{released[0][1]}"' in citation


def test_no_word_has_two_meanings():
    words = [word for cell in first_cells("docs/glossary.md") for word in re.findall(r"\*\*.+?\*\*[^,]*", cell)]
    assert len(words) > 50
    assert len(words) == len(set(words))


# ---- paths and lines -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_paths_exist(page: Path):
    """A path is of the repository or, as in `plan/lower/`, of the package; <family> and * stand for any name."""
    prose = re.sub(r"^ *```.*?^ *```", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    missing = []
    for path in re.findall(r"`([\w.<>*-]+/[\w.<>*/-]*)`", prose):
        pattern = re.sub(r"<\w+>", "*", path).rstrip("/")
        if not path.startswith((".venv/", "build/")) and not any([*ROOT.glob(pattern), *PACKAGE.glob(pattern)]):
            missing.append(path)
    assert not missing


@pytest.mark.parametrize("page", sorted(ROOT.glob("*.md")), ids=name)
def test_links_of_the_pages_outside_the_site(page: Path):
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text("utf-8"))
    assert not [link for link in links if not (ROOT / link).exists()]


QUOTES = [
    pytest.param(path, lines, id=f"{page.stem}-{path}")
    for page in PAGES
    for path, lines in re.findall(r'^ *```\w+ title="([^"]+)"\n(.*?)^ *```', page.read_text("utf-8"), re.M | re.S)
]


@pytest.mark.parametrize(("path", "lines"), QUOTES)
def test_quoted_lines_stand_in_their_file(path: str, lines: str):
    """A block of code with a path as its title has lines of that file; a comment behind them may be left out."""
    there = [line.strip() for line in read(path).splitlines()]
    quoted = [line.strip() for line in lines.splitlines()]
    assert not [line for line in quoted if not any(t.startswith(line) for t in there)]


def test_readme_is_short():
    lines = read("README.md").splitlines()
    assert len(lines) < 120
    assert {"make demo", "make test"} <= {line.split("  ")[0] for line in lines}


# ---- notebooks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_notebooks_are_stored_as_they_ran(path: Path):
    cells = [cell for cell in json.loads(path.read_text("utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == [*range(1, len(cells) + 1)]
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert outputs
    assert not [output for output in outputs if output["output_type"] == "error"]
    code = "".join("".join(cell["source"]) for cell in cells)
    assert not re.findall(r"\._[a-z]\w*|\b_core\w*|assert .*(?:time|seconds)", code)


def test_there_are_three_notebooks():
    assert [path.stem for path in NOTEBOOKS] == ["compare_kernels", "first_prompt", "follow_a_prompt"]
