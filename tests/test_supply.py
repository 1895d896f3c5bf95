"""What is shipped and what builds it: licences, the bill of materials, pinned actions, no network at import or load."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from support.paths import DATA, ROOT

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
#: Licences that let anybody use and pass on a program with these parts. MPL-2.0 asks only for changes of its files.
ALLOWED = {"MIT", "BSD-2-Clause", "BSD-3-Clause", "0BSD", "Apache-2.0", "MPL-2.0", "Zlib", "CC0-1.0", "PSF-2.0", "ISC"}
#: A sentence of the text of each licence of the page's libraries.
SENTENCES = {
    "MIT": "Permission is hereby granted, free of charge",
    "BSD-3-Clause": "Neither the name of the copyright holder",
    "MPL-2.0 OR Apache-2.0": "Apache License",
}


def bills() -> Any:
    """Loads ``.ci/sbom.py``."""
    spec = importlib.util.spec_from_file_location("sbom", ROOT / ".ci" / "sbom.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def bill() -> dict[str, Any]:
    pytest.importorskip("pip")
    sbom = bills()
    first, second = sbom.bill(), sbom.bill()
    assert json.dumps(first) == json.dumps(second)
    made: dict[str, Any] = first
    return made


def test_everything_that_is_needed_is_in_the_bill(bill: dict[str, Any]) -> None:
    names = {component["name"] for component in bill["components"]}
    assert {"numpy", "tokenizers", "jinja2", "markupsafe", "tqdm", "starlette", "uvicorn", "h11", "marked"} <= names
    assert not names & {"pytest", "ruff", "mypy", "ray", "zincmetal"}
    assert all(re.fullmatch(r"pkg:(pypi|npm)/.+@.+", component["purl"]) for component in bill["components"])


def test_every_licence_is_known_and_lets_users_go_on(bill: dict[str, Any]) -> None:
    wrong = {}
    for component in bill["components"]:
        expression = " ".join(one["expression"] for one in component["licenses"])
        if not expression or not set(re.split(r" (?:AND|OR) ", expression.strip("()"))) <= ALLOWED:
            wrong[component["name"]] = expression
    assert wrong == {}


def test_the_pages_libraries_ship_the_text_of_their_licence() -> None:
    vendor = bills().VENDOR
    for name, entry in json.loads(vendor.read_text()).items():
        texts = [vendor.parent / file for file in entry["files"] if file.endswith(".LICENSE")]
        assert len(texts) == 1, name
        assert SENTENCES[entry["licence"]] in " ".join(texts[0].read_text().split()), name


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_actions_are_pinned_and_may_only_read(path: Path) -> None:
    text = path.read_text()
    used = re.findall(r"uses: *(\S+)(.*)", text)
    assert used
    for action, comment in used:
        assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", action), action
        assert re.fullmatch(r" # v\d+\.\d+\.\d+", comment), f"{action}: the version belongs behind it"
    assert re.findall(r"^permissions:\n  contents: read$", text, re.MULTILINE)
    assert "pull_request_target" not in text


def test_an_import_and_a_load_open_no_connection() -> None:
    """Every socket but one of two local ends is refused by an audit hook."""
    code = f"""
import sys
opened = []
def watch(event, args):
    if event in ("socket.connect", "socket.bind", "socket.getaddrinfo", "socket.gethostbyname", "urllib.Request"):
        opened.append((event, repr(args)))
sys.addaudithook(watch)
import zincmetal
with zincmetal.load({str(DATA / "llama-q4_k_m.gguf")!r}, device="cpu", context=64) as model:
    model.generate([1, 2, 3], max_tokens=2)
assert not opened, opened
import socket
try:
    socket.create_connection(("127.0.0.1", 9), timeout=1)
except OSError:
    pass
assert opened, "the hook sees no connection"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
