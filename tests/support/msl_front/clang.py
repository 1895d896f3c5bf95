"""Runs clang on MSL: its errors, syntax tree and LLVM IR."""

from __future__ import annotations

import bisect
import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from . import source
from .tokens import MARKER

STANDARD = Path(__file__).parent / "include"
#: What MSL is made of: C++14, and the version that brought bfloat.
METAL_3 = ("-std=c++14", "-D__METAL_VERSION__=310")
#: With tensor operations: objects of classes are template arguments there.
METAL_4 = ("-std=c++20", "-D__METAL_VERSION__=400", "-DCOOPERATIVE=1")
KERNEL_MARK = "kernel function"

# Address spaces by number. Everything else is in `thread`, the space of all that C++ declares without a keyword.
SPACE_MACROS = {
    "device": "__attribute__((address_space(1)))",
    "constant": "const __attribute__((address_space(2)))",
    "threadgroup": "__attribute__((address_space(3)))",
    "thread": "__attribute__(())",
    "kernel": f'__attribute__((annotate("{KERNEL_MARK}")))',  # so that the IR knows them
    "METAL_FUNC": "inline",
}
# Apple Silicon's types and layouts.
TARGET = ["-target", "aarch64-macos", "-nostdinc", "-nostdinc++", "-ffreestanding", "-x", "c++"]
LANGUAGE = ["-flax-vector-conversions=none", "-fno-exceptions", "-fno-rtti", "-fno-sanitize=all"]
WARNINGS = ["-Wno-reserved-user-defined-literal", "-ferror-limit=0", "-Werror=return-stack-address"]
CXX14 = ("-Werror=c++17-extensions", "-Werror=c++20-extensions", "-Werror=c++23-extensions")
# The warnings of cmake/Metal.cmake, but for what comes of declarations alone and of a `constant` that is const twice.
NO_WARNING = ("-Wall", "-Wextra", "-Werror", "-Wno-unused-parameter", "-Wno-unused-variable", "-Wno-undefined-inline",
              "-Wno-undefined-internal", "-Wno-duplicate-decl-specifier",
              "-Wno-unused-command-line-argument")  # fmt: skip


@dataclass(frozen=True)
class Violation:
    """A line that breaks a rule of MSL."""

    rule: str
    file: str
    line: int
    message: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: [{self.rule}] {self.message}"


def is_available() -> bool:
    return importlib.util.find_spec("ziglang") is not None


def run_clang(folder: Path, arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Runs clang in a folder, where it may leave files."""
    command = [sys.executable, "-m", "ziglang", "c++", *TARGET, *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


SAID = re.compile(r"^(.+?):(\d+):\d+: (fatal error|error|note): (.*)$", re.MULTILINE)


def diagnostics(said: str) -> list[Violation]:
    """Reads clang's errors. An error in metal_stdlib is moved to the first line outside that led to it."""
    errors: list[Violation] = []
    is_open = False  # whether the last error still lacks a place
    for file, line, level, message in SAID.findall(said):
        standard = file.startswith(str(STANDARD))
        if level != "note":
            errors.append(Violation("compile", file, int(line), message))
            is_open = standard
        elif is_open and not standard:
            errors[-1] = Violation("compile", file, int(line), errors[-1].message)
            is_open = False
    return errors


# Without vectors that the optimiser makes, which a GPU has no use for.
OPTIMISED = ("-O2", "-fno-vectorize", "-fno-slp-vectorize", "-fno-discard-value-names", "-gline-tables-only",
             "-mllvm", "-jump-threading-threshold=0", "-Wno-error", "-Wpass-failed")  # fmt: skip
PASS_FAILED = re.compile(r"^(.+?):(\d+):\d+: warning: (.*) \[-Wpass-failed.*\]$", re.MULTILINE)


class Program:
    """A kernel file as clang sees it. Without ``CXX14`` code of C++17 or later passes, as with Apple's compiler."""

    def __init__(
        self,
        path: Path,
        folder: Path,
        includes: Sequence[Path] = (),
        options: Sequence[str] = CXX14,
        version: Sequence[str] = METAL_3,
    ) -> None:
        self.flags = [*LANGUAGE, *WARNINGS, version[0], *options]
        defines = [*version, "-D__METAL__", "-D__HAVE_BFLOAT__=1"]
        search = [f"-I{include.resolve()}" for include in (STANDARD, *includes)]
        # Apple's compiler knows the types before any header.
        said = run_clang(
            folder, ["-E", "-include", str(STANDARD / "types.h"), *WARNINGS, *defines, *search, str(path.resolve())]
        )
        self.preprocessor_errors = diagnostics(said.stderr)
        self.source = source.read(said.stdout, str(STANDARD))
        self.path = folder / (path.stem + ".cpp")
        self.path.write_text(self.source.text)

    def compile(self, *arguments: str) -> tuple[str, list[Violation]]:
        macros = [f"-D{name}={value}" for name, value in SPACE_MACROS.items()]
        done = run_clang(self.path.parent, [*self.flags, *macros, *arguments, str(self.path)])
        errors = diagnostics(done.stderr)
        if done.returncode != 0 and not errors:
            raise RuntimeError(done.stderr)
        return done.stdout, errors

    @cached_property
    def ir_and_errors(self) -> tuple[str, list[Violation]]:
        """LLVM IR before any pass, and clang's errors."""
        ir = self.path.with_suffix(".ll")
        passes = ["-O1", "-Xclang", "-disable-llvm-passes", "-fno-discard-value-names"]
        instances = f"-D{source.INSTANTIATE}(...)=__VA_ARGS__"
        errors = self.compile(instances, *passes, "-g0", "-S", "-emit-llvm", "-o", str(ir))[1]
        return ir.read_text() if not errors else "", errors

    @cached_property
    def optimised(self) -> tuple[str, list[Violation]]:
        """LLVM IR with every METAL_FUNC inlined and loops unrolled, and the loops that fail to unroll."""
        ir = self.path.with_suffix(".optimised.ll")
        macros = {**SPACE_MACROS, "METAL_FUNC": "inline __attribute__((always_inline))"}
        arguments = [*self.flags, *(f"-D{name}={value}" for name, value in macros.items()), *OPTIMISED]
        arguments += [f"-D{source.INSTANTIATE}(...)=__VA_ARGS__", "-S", "-emit-llvm", "-o", str(ir), str(self.path)]
        done = run_clang(self.path.parent, arguments)
        if done.returncode != 0:
            raise RuntimeError(done.stderr)
        loops = [
            Violation("registers", file, int(line), words) for file, line, words in PASS_FAILED.findall(done.stderr)
        ]
        return ir.read_text(), loops

    @property
    def errors(self) -> list[Violation]:
        return self.preprocessor_errors + self.ir_and_errors[1]

    @property
    def ir(self) -> str:
        return self.ir_and_errors[0]

    @cached_property
    def tree(self) -> dict[str, Any]:
        """The syntax tree without instances. Its offsets are into ``source.text``."""
        without = f"-D{source.INSTANTIATE}(...)="
        tree: dict[str, Any] = json.loads(self.compile(without, "-fsyntax-only", "-Xclang", "-ast-dump=json")[0])
        return tree

    @cached_property
    def lines(self) -> tuple[list[int], list[tuple[str, int]]]:
        """The offset of each line of the text, and its file and line."""
        begins, places = [], []
        at, file, number = 0, "", 0
        for text in self.source.text.splitlines(keepends=True):
            marker = MARKER.match(text)
            begins.append(at)
            places.append((file, number))
            file, number = (marker[2], int(marker[1])) if marker else (file, number + 1)
            at += len(text.encode())
        return begins, places

    def place(self, offset: int) -> tuple[str, int]:
        begins, places = self.lines
        return places[bisect.bisect_right(begins, offset) - 1]

    def is_standard(self, offset: int) -> bool:
        return self.place(offset)[0] in ("", str(self.path)) or self.place(offset)[0].startswith(str(STANDARD))
