"""Compares the plans of two checkouts, byte for byte: ``python bench/same_plans.py OLD NEW FILE.gguf ...``.

Each checkout needs its compiled modules (in ``python/zincmetal/`` or installed), and shapes of steps (after 0.1.0).
Every file is planned for steps of 1 and 8 single rows, and of 32 and 512 rows with and without single rows, for every
output, K/V type and backend. Exit status 1: ``plan.to_json()`` differs for one of them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

OUTPUTS, KV_TYPES, BACKENDS = ("none", "argmax", "draw", "all"), ("f16", "q8_0"), ("cpu", "metal", "cuda")


def shapes() -> Iterator[Any]:
    """Yields the shapes of steps to plan."""
    chunks = import_module("zincmetal.plan.chunks")
    for output in OUTPUTS:
        yield from (chunks.decode_shape(n, output) for n in (1, 8))
        for rows in (32, 512):
            outs = {"none": 0, "all": 32}.get(output, 1)
            yield from (chunks.chunk_shape(rows, singles, outs, output) for singles in (0, 5))


def planner(path: str, backend_name: str, kv: str) -> Any:
    """Makes the planner of a file for another backend: the CPU's info, with that backend's name."""
    core, device = import_module("zincmetal.device.backend").open_device("cpu", 1)
    file = import_module("zincmetal.gguf").open(path)
    target = import_module("zincmetal.plan.target").Target.of(core, {**device.info, "backend": backend_name})
    return import_module("zincmetal.plan.planner").Planner(file, target, 2048, kv)


def write_plans(folder: Path, paths: list[str]) -> None:
    """Writes every plan of this checkout to ``folder``, or the error if there is no plan."""
    for path in paths:
        for backend in BACKENDS:
            for kv in KV_TYPES:
                name = f"{Path(path).stem}.{backend}.{kv}"
                try:
                    made = planner(path, backend, kv)
                except Exception as error:
                    (folder / f"{name}.error").write_text(f"{type(error).__name__}: {error}")
                    continue
                for shape in shapes():
                    (folder / f"{name}.{shape}.json").write_text(made.plan(shape).to_json())


def plans_of(checkout: Path, paths: list[str], folder: Path) -> dict[str, str]:
    """Returns the plans of a checkout, by name."""
    folder.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(checkout.resolve() / "python")}
    command = [sys.executable, __file__, "--write", str(folder), *paths]
    subprocess.run(command, env=environment, check=True)
    return {p.name: p.read_text() for p in sorted(folder.iterdir())}


def first_difference(old: str, new: str) -> str:
    """Describes the first difference of two plans."""
    try:
        pairs = zip(json.loads(old)["dispatches"], json.loads(new)["dispatches"], strict=True)
        return next((f"dispatch {i}: {a} -> {b}" for i, (a, b) in enumerate(pairs) if a != b), "outside the dispatches")
    except ValueError:
        return f"{old[:200]!r} -> {new[:200]!r}"


def main(argv: list[str]) -> int:
    """Compares two checkouts; returns the exit status."""
    if argv[:1] == ["--write"]:
        write_plans(Path(argv[1]), argv[2:])
        return 0
    old_checkout, new_checkout, *paths = argv
    with tempfile.TemporaryDirectory() as scratch:
        old = plans_of(Path(old_checkout), paths, Path(scratch) / "old")
        new = plans_of(Path(new_checkout), paths, Path(scratch) / "new")
    differing = [name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
    for name in differing[:10]:
        print(f"{name}: {first_difference(old.get(name, 'missing'), new.get(name, 'missing'))}")
    errors = sum(name.endswith(".error") for name in new)
    print(f"{len(new) - errors} plans of {len(paths)} files, {errors} files refused, {len(differing)} differ")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
