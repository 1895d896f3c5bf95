"""Holds the stubs ``_core.pyi`` and ``_host.pyi`` to the compiled modules: ``python -m support.core_stub``.

stubtest compares names, classes and attributes. It finds no signatures in a module that pybind11 made, because those
stand in the first lines of docstrings: :func:`drifts` compares them.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

import zincmetal
from support import metal_double_lane
from zincmetal.device import backend
from zincmetal.device.core import BoundDispatch

PACKAGE = Path(zincmetal.__file__).parent
STUB = PACKAGE / "_core.pyi"

# pybind11's own, and the buffer protocol, which is no attribute before Python 3.12.
ALLOWED = r"""
zincmetal\._core_\w+\.\w+\.__pybind11_module_local_\w+
zincmetal\._core_\w+\.Buffer\.__(buffer|init)__
zincmetal\._host\.Map\.__buffer__
"""
# stubtest asks for a metaclass where there is one, of whatever name.
METACLASS = "import typing\n@typing.type_check_only\nclass _Metaclass(type): ...\n"

Parameter = tuple[str, str, str, str]  # name, kind, default, type


def modules() -> list[str]:
    """Return the names of the compiled cores that this installation has."""
    return [f"zincmetal._core_{name}" for name in (*backend.DEVICES, "checked") if backend.is_built(name)]


def stubtest(names: Sequence[str], stub: str) -> tuple[int, str]:
    """Run stubtest on the cores ``names``, each described by the text ``stub``, and on ``_host``.

    Returns the exit status and the output.
    """
    with TemporaryDirectory() as folder:
        package = Path(folder) / "zincmetal"
        (package / "device").mkdir(parents=True)
        for empty in ("__init__.pyi", "device/__init__.pyi"):
            (package / empty).touch()
        (package / "device/core.pyi").write_text((PACKAGE / "device/core.py").read_text())
        for name in ("_core.pyi", "_host.pyi"):
            (package / name).write_text((PACKAGE / name).read_text())
        described = METACLASS + re.sub(r"^class (\w+):", r"class \1(metaclass=_Metaclass):", stub, flags=re.MULTILINE)
        for name in names:
            (Path(folder) / f"{name.replace('.', '/')}.pyi").write_text(described)
        (Path(folder) / "allowed").write_text(ALLOWED)
        (Path(folder) / "mypy.ini").write_text(f"[mypy]\nmypy_path = {folder}\nignore_missing_imports = true\n")
        options = ("--mypy-config-file", "mypy.ini", "--allowlist", "allowed", "--ignore-unused-allowlist", "--concise")
        return _run(folder, (*options, *names, "zincmetal._host"))


def _run(folder: str, argv: Sequence[str]) -> tuple[int, str]:
    """Run stubtest where it sees the package of this process, and the Metal double if that is installed."""
    code = f"import runpy, zincmetal; zincmetal.__path__[:] = {zincmetal.__path__!r}; runpy.run_module("
    code = f"import sys; sys.path.insert(0, {str(PACKAGE.parent)!r}); {code}'mypy.stubtest', run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", code, *argv], cwd=folder, capture_output=True, text=True, check=False, timeout=600
    )
    return done.returncode, done.stdout + done.stderr


def drifts(core: ModuleType, stub: str) -> list[str]:
    """Compare the signatures of the stub with those in a core's docstrings; return a line for each difference."""
    found = []
    for name, described in _functions(ast.parse(stub)):
        built = _built(core, name)
        if built and (difference := _difference(described, built)):
            found.append(f"{core.__name__}.{name}: {difference}")
    return found


def _functions(tree: ast.Module | ast.ClassDef, prefix: str = "") -> Iterator[tuple[str, ast.FunctionDef]]:
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            yield from _functions(node, f"{node.name}.")
        elif isinstance(node, ast.FunctionDef):
            yield prefix + node.name, node


def _built(core: ModuleType, name: str) -> ast.FunctionDef | None:
    """Read a function's or property's docstring as a definition; None if it has no signature."""
    found: Any = core
    for part in name.split("."):
        found = vars(found).get(part)
        if found is None:
            return None
    doc = found.fget.__doc__ if isinstance(found, property) else found.__doc__
    line = (doc or "").partition("\n")[0].replace(name.rpartition(".")[2], "", 1)
    line = re.sub(r"detail::[\w:<>]+", "object", line)  # a type of C++ that has no name in Python
    if not line.startswith("("):
        return None
    definition = ast.parse(f"def built{line}: ...").body[0]
    assert isinstance(definition, ast.FunctionDef)
    return definition


def _difference(described: ast.FunctionDef, built: ast.FunctionDef) -> str:
    """Return the first difference of two signatures in words; "" if there is none."""
    is_method = bool(built.args.args) and built.args.args[0].arg in ("self", "arg0")
    want, have = list(_parameters(described))[is_method:], list(_parameters(built))[is_method:]
    names = [[p[0] for p in parameters] for parameters in (want, have)]
    if names[0] != names[1]:
        return f"the stub has the parameters {names[0]}, the module {names[1]}"
    for (name, *a), (_, *b) in zip(want, have, strict=True):
        for what, stated, true in zip(("kind", "default", "type"), a, b, strict=True):
            if stated != true and true != _UNSAID:
                return f"the {what} of {name} is {stated} in the stub, {true} in the module"
    stated, true = _type(described.returns), _type(built.returns)
    return f"returns {stated} in the stub, {true} in the module" if true not in (stated, _UNSAID) else ""


def _parameters(of: ast.FunctionDef) -> Iterator[Parameter]:
    args = of.args
    positional = [*args.posonlyargs, *args.args]
    defaults: list[ast.expr | None] = [None] * (len(positional) - len(args.defaults))
    for arg, default in zip(positional, [*defaults, *args.defaults], strict=True):
        yield arg.arg, "positional", _text(default), _type(arg.annotation)
    for arg, default in zip(args.kwonlyargs, args.kw_defaults, strict=True):
        yield arg.arg, "keyword", _text(default), _type(arg.annotation)


_UNSAID = "not said"  # pybind11 gives no more than "dict", or names a protocol that is wider than the stub
_HIDDEN = re.compile(r"dict|tuple|object|numpy\.ndarray( \| None)?|(typing_extensions|collections\.abc)\.Buffer")
_FIELDS = ", ".join(getattr(t, "__forward_arg__", str(t)) for t in BoundDispatch.__annotations__.values())
# In this order: what stands for what.
_SPELLINGS = (
    (r"typing\.SupportsInt \| typing\.SupportsIndex", "int"),
    (r"\b(zincmetal\._core_\w+|collections\.abc|numpy\.typing|numpy|np|typing)\.", ""),
    (r"Annotated\[Sequence\[int\], 'FixedSize\(3\)'\]", "tuple[int, int, int]"),
    (r"\bBoundDispatch\b", f"tuple[{_FIELDS}]"),
    (r"\bBinding\b", "tuple[Buffer, int, int]"),
)


def _type(annotation: ast.expr | None) -> str:
    """Spell a type in one way for both; ``_UNSAID`` if pybind11 does not say it in full."""
    text = _text(annotation)
    if _HIDDEN.fullmatch(text):
        return _UNSAID
    for pattern, spelling in _SPELLINGS:
        text = re.sub(pattern, spelling, text)
    return text


def _text(node: ast.expr | None) -> str:
    return "" if node is None else ast.unparse(node)


def main() -> int:
    """Compare the stubs with everything that is built; the exit status: 1 if something differs."""
    double = None if backend.is_built("metal") else metal_double_lane.folder()
    if double:
        metal_double_lane.install(double)
    names, stub = modules(), STUB.read_text()
    status, output = stubtest(names, stub)
    wrong = [line for name in names for line in drifts(import_module(name), stub)]
    print(*wrong, output, sep="\n", end="")
    if double and "zincmetal._core_metal" in "".join([output, *wrong]):
        print(f"_core_metal is the Metal double in {double}; if it is old, `make test-metal-double` builds it")
    return status or bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
