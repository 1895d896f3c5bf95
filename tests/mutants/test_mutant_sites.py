"""The barriers and bounds of a source that become mutants (make mutants), and their text in the copy."""

from __future__ import annotations

import pytest
from mutant_sites import Source

from mutants import read_sources, read_survivors
from support.paths import KERNELS


def mutated(text: str) -> tuple[str, list[str], int]:
    """Returns the copy without its head and namespace, the changes, and the number of constants left out."""
    source = Source("a.metal", text, 0)
    copy = source.mutated().partition('#line 1 "a.metal"\n')[2].replace("::zinc_mutants::", "")
    return copy, [m.change for m in source.mutants], source.n_constant


BOUNDS = {
    "if (a < b + 1 && c) {}\n": ("if (a < moved<0>(b + 1) && c) {}\n", ["< b + 1 + 1", "< b + 1 - 1"]),
    "x = a[i] >= f<T, 2>(p.n, q) ? 1 : 2;\n": (
        "x = a[i] >= moved<0>(f<T, 2>(p.n, q)) ? 1 : 2;\n",
        [">= f<T, 2>(p.n, q) + 1", ">= f<T, 2>(p.n, q) - 1"],
    ),
    "return i != n;  // i < n\n": ("return i != moved<0>(n);  // i < n\n", ["!= n + 1", "!= n - 1"]),
    "y = min(a, g(b, c));\n": (
        "y = min(moved<0>(a), moved<1>(g(b, c)));\n",
        ["min(a + 1, ..)", "min(a - 1, ..)", "min(.., g(b, c) + 1)", "min(.., g(b, c) - 1)"],
    ),
    "n = (k + tile - 1) / p.tile * 2;\n": (
        "n = moved<0>((k + tile - 1) / p.tile) * 2;\n",
        ["(k + tile - 1) / p.tile + 1", "(k + tile - 1) / p.tile - 1"],
    ),
    "for (; i < min(a, b);) {}\n": (
        "for (; i < moved<0>(min(moved<1>(a), moved<2>(b)));) {}\n",
        ["< min(a, b) + 1", "< min(a, b) - 1", "min(a + 1, ..)", "min(a - 1, ..)", "min(.., b + 1)", "min(.., b - 1)"],
    ),
    "threadgroup_barrier(mem_flags::mem_none);\n": (
        "if (!deleted<0>()) threadgroup_barrier(mem_flags::mem_none);\n",
        ["deleted"],
    ),
}


@pytest.mark.parametrize("text", BOUNDS)
def test_barriers_and_bounds(text: str) -> None:
    copy, changes, n_constant = mutated(text)
    assert (copy, changes) == BOUNDS[text]
    assert n_constant == 0


CONSTANTS = [
    'static_assert(A <= 4, "fits");\n',
    "constexpr uint LANES = DIM <= 128 ? 8 : 16;\n",
    "#define LESS(a, b) \\\n    (a < b)\n",
]


@pytest.mark.parametrize("text", CONSTANTS)
def test_constants_are_left_out(text: str) -> None:
    assert mutated(text) == (text, [], 1)


@pytest.mark.parametrize("text", ["template <class T, uint N>\n", "vec<T, 4> x = a << 2 >> b->c;\n", "// a < b\n"])
def test_what_is_no_bound(text: str) -> None:
    assert mutated(text) == (text, [], 0)


def test_a_line_that_comes_twice_has_numbered_mutants() -> None:
    assert mutated("a < b;\na < b;\n")[1] == ["< b + 1", "< b - 1", "< b + 1 (#2)", "< b - 1 (#2)"]


def test_every_barrier_of_the_kernels_has_a_mutant() -> None:
    n_sites = 0
    for path in sorted(KERNELS.iterdir()):
        text = path.read_text()
        source = Source(path.name, text, n_sites)
        assert sum(m.change.startswith("deleted") for m in source.mutants) == text.count("group_barrier(")
        assert [m.site - n_sites for m in source.mutants[:1]] in ([], [0])
        n_sites += source.n_sites
    assert n_sites > 300


def test_listed_survivors_are_mutants() -> None:
    found = {(mutant.file, mutant.text, mutant.change) for source in read_sources() for mutant in source.mutants}
    assert {key for key, _ in read_survivors()} <= found
