"""``python -m support.fuzz NAME FOLDER [option of libFuzzer ...]``: fuzzes one harness with coverage, by atheris.

FOLDER takes the inputs that find something new. It begins with the corpus in ``tests/fuzz`` and the harness's seeds.
"""

from __future__ import annotations

import importlib
import logging
import sys
from hashlib import sha1
from pathlib import Path

import atheris
from atheris.import_hook import HookManager

from support.fuzz import NAMES
from support.paths import TESTS

#: Harnesses that see what is compared, and so find out which text or number a parser waits for. The others choose from
#: lists of words or of calls, and run up to twice as fast without.
COMPARED = ("gguf_files", "tokenizing", "templates")


def main(name: str, folder: Path, options: list[str]) -> None:
    """Instruments the package, and runs a harness until an option of libFuzzer ends it."""
    if name not in NAMES:
        raise SystemExit(f"no harness {name}; harnesses: {', '.join(NAMES)}")
    with HookManager({"zincmetal", "jinja2"}, set(), enable_loader_override=True, trace_dataflow=name in COMPARED):
        harness = importlib.import_module(f"support.fuzz.{name}")
        harness.run(harness.seeds()[0])  # imports what is imported late
    logging.disable(logging.CRITICAL)
    folder.mkdir(parents=True, exist_ok=True)
    known = sorted((TESTS / "fuzz" / "corpus" / name).glob("*"))
    for data in [*harness.seeds(), *(path.read_bytes() for path in known)]:
        (folder / sha1(data, usedforsecurity=False).hexdigest()).write_bytes(data)
    atheris.Setup([sys.argv[0], *options, str(folder)], harness.run)
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
