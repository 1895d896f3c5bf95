"""Hostile files of every kind, opened and planned: each is a typed error, in a second of the processor and in 64 MB."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from support import hostile_files
from support.paths import DATA
from zincmetal import gguf, models
from zincmetal.device import backend
from zincmetal.errors import ZincError
from zincmetal.gguf import header, quants
from zincmetal.plan.target import Target

MEMORY = 64 << 20  # bytes that a process may grow by for one file

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="peaks of memory are read as Linux tells them")


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What a fresh process says of each file of the table. One that takes too long ends the process."""
    command = [sys.executable, "-m", "support.hostile_files", str(tmp_path_factory.mktemp("hostile"))]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, f"{lines[-1:]} ended the process, {done.returncode}: {done.stderr[-2000:]}"
    return {begun["begun"]: result for begun, result in zip(lines[::2], lines[1::2], strict=True)}


def test_the_table_covers_each_kind_type_and_family(checked: dict[str, Any]) -> None:
    kinds = Counter(name.split(":")[0] for name in checked)
    assert set(kinds) == {"counts", "lengths", "tensors", "alignments", "splits", "metadata", "tables"}
    assert min(kinds.values()) >= 20
    assert sum(kinds.values()) >= 1000
    assert all(f"tensors: {t.name}: a byte short" in checked for t in quants.ALL)
    without = set(models.FAMILIES) - set(hostile_files.families())
    assert without == {"gemma-embedding", "nemotron_h"}  # they have no reference file


def test_every_file_is_a_typed_error_that_names_its_fault(checked: dict[str, Any]) -> None:
    wrong = {n: r for n, r in checked.items() if not (r["typed"] and re.search(r["wanted"], r["says"]))}
    assert wrong == {}


def test_no_file_takes_much_memory(checked: dict[str, Any]) -> None:
    assert {n: r["grew"] for n, r in checked.items() if r["grew"] > MEMORY} == {}


def test_the_check_sees_memory_and_faults(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    target = Target.of_kernels(backend.load("cpu"))
    assert hostile_files.check(DATA / "llama-q4_k_m.gguf", target)["error"] == "none"
    monkeypatch.setattr(hostile_files, "use", lambda path, target: len(bytes(b"\1" * (2 * MEMORY))))
    assert hostile_files.check(tmp_path, target)["grew"] > MEMORY
    monkeypatch.setattr(hostile_files, "use", lambda path, target: {}[path])
    assert not hostile_files.check(tmp_path, target)["typed"]


@pytest.mark.parametrize("change", ["cut", "replaced", "overwritten", "gone"])
def test_a_file_that_changes_while_it_is_read(change: str, tmp_path: Path) -> None:
    """Every part of a file may go at any time. What was not read before is an error or the old bytes, and no crash."""
    path = tmp_path / "m.gguf"
    path.write_bytes((DATA / "llama-q4_k_m.gguf").read_bytes())
    with gguf.open(path) as file:
        before = {name: file.data(name).tobytes() for name in file.tensors}
        if change == "cut":
            path.open("r+b").truncate(100)
        elif change == "replaced":
            (tmp_path / "other").write_bytes(bytes(len(path.read_bytes())))
            (tmp_path / "other").replace(path)
        elif change == "overwritten":
            path.write_bytes(bytes(1000))
        else:
            path.unlink()
        same = change in ("replaced", "gone")
        for key in file.metadata:
            try:
                file.metadata[key]
            except ZincError:
                assert not same
        assert all(file.data(name).tobytes() == before[name] for name in file.tensors) == same
        if same:
            file.check()
        else:
            with pytest.raises(ZincError, match=re.escape(str(path))):
                file.check()


def at_limits() -> dict[str, bytes]:
    """Good files whose sizes are limits."""
    b = hostile_files.b
    return {
        "a name of the limit": b.gguf([b.key("k" * header.MAX_NAME, b.U8, b"\1")]),
        "four dimensions": b.gguf([], [b.tensor("t", [32, 1, 1, 2], hostile_files.F32.id, 0)], bytes(256)),
        "no dimension": b.gguf([], [b.tensor("t", [], hostile_files.F32.id, 0)], bytes(4)),
        "the least alignment": b.gguf(
            [b.key("general.alignment", b.U32, b.u32(8))],
            [b.tensor("t", [1], hostile_files.F32.id, 0), b.tensor("u", [1], hostile_files.F32.id, 8)],
            bytes(12),
            alignment=8,
        ),
        "no key and no tensor": b.gguf(),
        "an empty array": b.gguf([b.key("k", b.ARRAY, b.array(b.STR, b"", 0))]),
        "an empty string": b.gguf([b.key("k", b.STR, b.string(""))]),
    }


@pytest.mark.parametrize("name", at_limits())
def test_files_at_a_limit_are_read(name: str, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(at_limits()[name])
    with gguf.open(path) as file:
        for tensor in file.tensors.values():
            assert file.data(tensor.name).size == tensor.nbytes
        for key in file.metadata:
            file.metadata[key]


def test_a_kind_of_file_that_is_no_text_is_ignored(tmp_path: Path) -> None:
    """``general.type`` may be any value. An array was an error without a type."""
    path = hostile_files.family("llama", {"general.type": [1, 2]}, {})(tmp_path)
    hostile_files.use(path, Target.of_kernels(backend.load("cpu")))
