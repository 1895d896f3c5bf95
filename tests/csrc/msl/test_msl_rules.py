"""The kernels keep the rules of Metal Shading Language: those that clang knows, and those of ``msl_front``.

For each rule a test shows that it finds a kernel that breaks it.
"""

from __future__ import annotations

import os
import random
import re
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from support.msl_front import layout, planted, rules, signatures, source
from support.msl_front.clang import CXX14, METAL_4, NO_WARNING, Program, Violation, is_available
from support.paths import KERNELS
from zincmetal.device import backend

pytestmark = pytest.mark.skipif(
    not is_available(), reason="needs clang of the PyPI package ziglang: pip install ziglang"
)

SEED = int(os.environ.get("ZINCMETAL_TEST_SEED", secrets.randbits(32)))
FILES = sorted(path.name for path in KERNELS.glob("*.metal"))

Check = Callable[[str], list[Violation]]


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Program]:
    """Makes the front end's view of each kernel file, once."""
    folder, known = tmp_path_factory.mktemp("msl"), dict[str, Program]()

    def program(file: str) -> Program:
        if file not in known:
            known[file] = Program(KERNELS / file, folder, [KERNELS], (*CXX14, *NO_WARNING))
        return known[file]

    return program


@pytest.mark.parametrize("file", FILES)
def test_kernel_file_keeps_the_rules(programs: Callable[[str], Program], file: str, tmp_path: Path) -> None:
    if (short := source.of_group(KERNELS / file, tmp_path)) is None:
        program = programs(file)
    else:
        program = Program(short, tmp_path, [KERNELS], (*CXX14, *NO_WARNING))
    assert program.source.kernels
    assert program.source.instances
    assert rules.violations(program) == []
    assert rules.hazards(program) == []


#: Files of the usual types; the sources of groups include them.
COOPERATIVE = [file for file in FILES if '"mul_mm_cooperative.h"' in (KERNELS / file).read_text()]


def of_metal_4(file: str, folder: Path, kernels: Path = KERNELS) -> Program:
    """Makes the front end's view of a file with tensor operations, for one quant type."""
    path = folder / "of_metal_4.metal"
    path.write_text(f'#define SOURCE_TYPES(T) T("q4_k", Quantised<Q4_K>)\n#include "{file}"\n')
    return Program(path, folder, [kernels], NO_WARNING, METAL_4)


@pytest.mark.parametrize("file", COOPERATIVE)
def test_kernels_of_tensor_operations_keep_the_rules(file: str, tmp_path: Path) -> None:
    program = of_metal_4(file, tmp_path)
    assert any("_coop_" in instance.host_name for instance in program.source.instances)
    assert rules.violations(program) == []
    assert rules.hazards(program) == []


def test_kernels_of_tensor_operations_are_of_metal_4() -> None:
    assert len(COOPERATIVE) == 3


def test_a_tensor_operation_that_not_all_threads_reach_is_found(tmp_path: Path) -> None:
    kernels = shutil.copytree(KERNELS, tmp_path / "kernels")
    header = kernels / "mul_mm_cooperative.h"
    run = "    CooperativeProduct<Shape>().run(x, w, sums);"
    assert run in header.read_text()
    apart = run.replace("Coop", "if (simd_is_first()) Coop")
    header.write_text(header.read_text().replace(run, apart))
    program = of_metal_4("mul_heads.metal", tmp_path, kernels)
    assert any("tensor_operation" in str(found) for found in rules.violations(program) + rules.hazards(program))


def test_warning_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "warned.metal"
    path.write_text('#include "common.h"\nMETAL_FUNC bool f(uint a, int b) { return a < b; }\n')
    errors = Program(path, tmp_path, [KERNELS], (*CXX14, *NO_WARNING)).errors
    assert [error.line for error in errors] == [2]
    assert "different signs" in errors[0].message
    assert Program(path, tmp_path, [KERNELS]).errors == []


@pytest.mark.parametrize("header", ["metal_array", "metal_limits", "metal_type_traits", "metal_atomic", "simd/simd.h"])
def test_apple_header_is_there(header: str, tmp_path: Path) -> None:
    path = tmp_path / "including.metal"
    path.write_text(f"#include <{header}>\n#if !__HAVE_BFLOAT__\n#error\n#endif\nfloat4 f(uint2 x);\n")
    assert Program(path, tmp_path).errors == []


def test_host_names_are_unique_and_complete(programs: Callable[[str], Program]) -> None:
    """Host names are unique over all files, and every instance in the text is found."""
    sources = [programs(file).source for file in FILES]
    instances = [instance for source in sources for instance in source.instances]
    kernels = [kernel for source in sources for kernel in source.kernels]
    assert list(signatures.instance_violations(instances, kernels)) == []
    used = {instance.function.partition("<")[0] for instance in instances}
    assert used == {kernel.name for kernel in kernels}


def judge(folder: Path, text: str, is_run: bool = False) -> list[Violation]:
    """Returns the violations of a kernel file of this text, and its hazards, with lines counted from 1."""
    path = folder / "planted.metal"
    path.write_text(f'{planted.HEADER}#line 1 "planted.metal"\n{text}')
    program = Program(path, folder, [KERNELS])
    names = signatures.instance_violations(program.source.instances, program.source.kernels)
    hazards = rules.hazards(program) if is_run and not program.errors else []
    return rules.violations(program) + list(names) + hazards


def judge_all(folder: Path, codes: dict[str, str]) -> dict[str, list[Violation]]:
    """Judges several codes in one file; returns the violations of each, by their lines."""
    text, name_of_line = "", list[str]()
    for i, (name, code) in enumerate(codes.items()):
        text += f"{code}\n" if "KERNEL" in code else f"namespace planted_{i} {{ {code} }}\n"
        name_of_line += [name] * (code.count("\n") + 1)
    found: dict[str, list[Violation]] = {name: [] for name in codes}
    for violation in judge(folder, text):
        assert violation.file == "planted.metal", violation
        found[name_of_line[violation.line - 1]].append(violation)
    return found


def assert_objects(found: list[Violation], entry: planted.Entry) -> None:
    """Fails unless this rule alone objects; clang may refuse the code too."""
    said = [str(v) for v in found]
    assert any(v.rule == entry.rule and re.search(entry.words, v.message) for v in found), said
    assert {v.rule for v in found} <= {entry.rule} | ({"compile"} if entry.is_refused else set()), said


DECLARATIONS = planted.entries("declarations")
CALLED = planted.entries("declarations, and after a line ---- an expression of the kernel that uses them")
ARGUMENTS = planted.entries("arguments after params")
BESIDE = planted.entries("beside a kernel that is right")
LEGAL_KERNELS = planted.entries("legal kernels")
LEGAL = planted.entries("legal declarations")
DEFINED = planted.entries("legal kernels without hazards")


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Violation]]:
    """Judges refused and accepted code apart: rules beyond clang's apply to accepted files only."""
    refused = {name: entry.code for name, entry in DECLARATIONS.items() if entry.is_refused}
    taken = {name: entry.code for name, entry in (DECLARATIONS | LEGAL).items() if not entry.is_refused}
    kernels = {name: planted.with_arguments(i, ARGUMENTS[name].code) for i, name in enumerate(ARGUMENTS)}
    folder = tmp_path_factory.mktemp("planted")
    return judge_all(folder, refused) | judge_all(folder, taken) | judge_all(folder, kernels)


@pytest.mark.parametrize("name", DECLARATIONS)
def test_rule_objects(name: str, judged: dict[str, list[Violation]]) -> None:
    assert_objects(judged[name], DECLARATIONS[name])


@pytest.mark.parametrize("name", ARGUMENTS)
def test_rule_objects_to_arguments(name: str, judged: dict[str, list[Violation]]) -> None:
    assert_objects(judged[name], ARGUMENTS[name])


@pytest.mark.parametrize("name", CALLED)
def test_rule_objects_to_what_is_called(name: str, tmp_path: Path) -> None:
    declarations, _, expression = CALLED[name].code.partition("----")
    assert_objects(judge(tmp_path, declarations + planted.good(expression.strip())), CALLED[name])


@pytest.mark.parametrize("name", BESIDE)
def test_rule_objects_beside_a_good_kernel(name: str, tmp_path: Path) -> None:
    assert_objects(judge(tmp_path, planted.good() + BESIDE[name].code), BESIDE[name])


@pytest.mark.parametrize("name", LEGAL)
def test_legal_code_passes(name: str, judged: dict[str, list[Violation]]) -> None:
    """The front end is not stricter than MSL: legal code passes, also in a file with violations."""
    assert judged[name] == []


@pytest.mark.parametrize("name", LEGAL_KERNELS)
def test_legal_kernel_passes(name: str, tmp_path: Path) -> None:
    assert judge(tmp_path, planted.good() + LEGAL_KERNELS[name].code) == []


@pytest.mark.parametrize("name", DEFINED)
def test_kernel_without_hazards_passes(name: str, tmp_path: Path) -> None:
    assert judge(tmp_path, DEFINED[name].code, is_run=True) == []


# ---- one fault in a kernel -------------------------------------------------------------------------------------------

FAULTS = planted.faults()


def test_faults_are_of_both_kinds() -> None:
    kinds = [fault.kind for fault in FAULTS.values()]
    assert (kinds.count("refused"), kinds.count("undefined")) == (31, 9)
    assert sum(bool(fault.rule) for fault in FAULTS.values()) >= 30


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_found(name: str, tmp_path: Path) -> None:
    """Each fault is found by its own rule. A fault that is listed as missed is still missed."""
    fault = FAULTS[name]
    found = judge(tmp_path, fault.text, is_run=True)
    said = [str(v) for v in found]
    if fault.rule:
        assert any(v.rule == fault.rule and re.search(fault.words, v.message) for v in found), said
    else:
        assert said == [], "no longer missed"


# ---- every address space of every kernel -----------------------------------------------------------------------------

WRONG_SPACE = {"device": "threadgroup", "threadgroup": "device", "thread": "threadgroup", "constant": "threadgroup"}
N_CHANGES = 4
NEVER_INSTANTIATED = {"mul_few_raw.h"}  # by Metal: its templates are those of NVIDIA's tiles


def changes() -> list[tuple[str, int, str, str]]:
    """Yields (file, place, word, replacement) for every address space written in the kernels."""
    found = []
    for path in sorted(set(KERNELS.iterdir()) - {KERNELS / name for name in NEVER_INSTANTIATED}):
        text = re.sub(r"//[^\n]*|/\*.*?\*/", lambda comment: " " * len(comment[0]), path.read_text(), flags=re.DOTALL)
        for match in re.finditer(rf"\b({'|'.join(WRONG_SPACE)})\b(?!\()", text):
            found += [(path.name, match.start(), match[1], instead) for instead in ("", WRONG_SPACE[match[1]])]
    return found


def users(name: str) -> list[str]:
    """Lists the kernel files that are or include this file."""
    known = {name}
    while True:
        pattern = rf'#include "({"|".join(re.escape(n) for n in known)})"'
        more = {path.name for path in KERNELS.iterdir() if re.search(pattern, path.read_text())} | known
        if more == known:
            return sorted(n for n in known if n.endswith(".metal"))
        known = more


def is_refused(change: tuple[str, int, str, str], folder: Path) -> bool | None:
    """Whether a changed kernel breaks a rule; None if Metal does not compile the line, as it is another lane's."""
    file, at, word, instead = change
    changed = shutil.copytree(KERNELS, folder / f"{file}-{at}-{instead}")
    text = (changed / file).read_text()
    (changed / file).write_text(text[:at] + instead + text[at + len(word) :])
    place = (str((changed / file).resolve()), text.count("\n", 0, at) + 1)
    is_seen = False
    for user in users(file):
        program = Program(changed / user, folder, [changed])
        if rules.violations(program):
            return True
        is_seen |= any((token.file, token.line) == place for token in program.source.tokens)
    return False if is_seen else None


@pytest.mark.parametrize("i", range(N_CHANGES))
def test_another_address_space_is_refused(i: int, tmp_path: Path) -> None:
    """An address space left out or changed breaks a rule in one of the files that include it."""
    random_ = random.Random(SEED + i)
    known = changes()
    while (refused := is_refused(change := random_.choice(known), tmp_path)) is None:
        known.remove(change)
    print(f"ZINCMETAL_TEST_SEED={SEED}: {change} (file, byte, word, replacement)")
    assert refused


# ---- layouts -----------------------------------------------------------------------------------------------------


def test_layout_rules_are_clangs(tmp_path: Path) -> None:
    """The layout rules hold for vectors, arrays and padding too, which params.h does not use."""
    text = (
        "#include <metal_stdlib>\nusing namespace metal;\n"
        + """
struct Small { char a; short b; bool c; };
struct Vectors { char a; float3 b; half c; uint2 d; half3 e; ushort f; };
struct Arrays { half a[3]; float b[2][5]; uchar c; ulong2 d[2]; char2 e; };
struct Last { float4 a; bfloat b; };
"""
    )
    path = tmp_path / "shapes.metal"
    path.write_text(text)
    fields_of = layout.structures(Program(path, tmp_path), path.name)
    clangs = layout.by_clang(text, fields_of, tmp_path, [])
    assert {name: layout.by_rules(fields, fields_of) for name, fields in fields_of.items()} == clangs
    assert clangs["Vectors"].offsets == {"a": 0, "b": 16, "c": 32, "d": 40, "e": 48, "f": 56}
    assert (clangs["Vectors"].size, clangs["Last"].size) == (64, 32)


def test_params_lie_alike_everywhere(tmp_path: Path) -> None:
    """Structures of params.h have one layout: by MSL's rules, for clang, in C++ and in NumPy."""
    cores = [name for name in ("cpu", "checked", "cuda", "metal") if backend.is_built(name)]
    if not cores:
        pytest.skip("no compiled core is installed")
    core = backend.load(cores[0])
    text = '#include <metal_stdlib>\nusing namespace metal;\n#include "params.h"\n'
    path = tmp_path / "probe.metal"
    path.write_text(text)
    fields_of = layout.structures(Program(path, tmp_path, [KERNELS]), "params.h")
    assert len(fields_of) == len(re.findall(r"^struct \w+ {", (KERNELS / "params.h").read_text(), re.MULTILINE)) > 0
    for name, clangs in layout.by_clang(text, fields_of, tmp_path, [KERNELS]).items():
        dtype = core.params_dtype(name)
        assert dtype.fields is not None
        numpys = {field: offset for field, (_, offset, *_) in dtype.fields.items()}
        assert layout.by_rules(fields_of[name], fields_of) == clangs, name
        assert (dtype.itemsize, numpys) == (clangs.size, clangs.offsets), name
        sizes = {field: layout.size_and_alignment(type_, fields_of)[0] for field, type_ in fields_of[name].items()}
        assert {field: of.itemsize for field, (of, *_) in dtype.fields.items()} == sizes, name
