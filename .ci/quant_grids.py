"""Writes kernels/quant_grids.h: the grids of python/zincmetal/gguf/grids.py, as tables for kernels.

Usage: python .ci/quant_grids.py [--check]. With --check it writes nothing, and exits with 1 if the file is not current.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parents[1]
HEADER = ROOT / "kernels" / "quant_grids.h"
# By its path, since the package needs to be built.
grid = runpy.run_path(str(ROOT / "python" / "zincmetal" / "gguf" / "grids.py"))["grid"]

HEAD = """\
// Made by .ci/quant_grids.py: the points of the grids of IQ types. quant_grid_blocks.h says how they are read.
#pragma once

#include "params.h"

// In Metal they are in the constant address space. Lanes look up different points, so a table is read as any memory,
// and stays in the first cache beside weights, which pass once. CUDA's __constant__ would serve such lanes one by one:
// there they are plain global memory, read through the same cache. There is no copy in threadgroup memory: for it the
// few rows of a threadgroup would load as much as they look up, and wait at a barrier.
#ifdef __METAL_VERSION__
#define GRID_TABLE constant constexpr
typedef ushort u16;
typedef ulong u64;
#else
#ifdef __CUDACC__
#define GRID_TABLE [[maybe_unused]] static __device__ const
#else
#define GRID_TABLE [[maybe_unused]] static const
#endif
typedef uint16_t u16;
typedef uint64_t u64;
#endif

"""


def bytes_of(name: str) -> NDArray[np.uint8]:
    """Return the bytes of a table, [points, values]."""
    points = grid(name).astype(np.uint8)
    return 8 + points // 2 if name == "iq3_s" else 64 + points


def pairs_of_bits(points: NDArray[np.int8]) -> NDArray[np.uint16]:
    """Pack points [n, 8] of -1, 0 and 1, plus 1: nibble i has weights j and 4 + j, where j is 0, 2, 1, 3 for i 0 to 3.

    Then a word w, as (w | w << 12) & 0x0F0F0F0F, has the nibbles of weights 0 to 3 in bytes 0 to 3.
    """
    codes = (points + 1).astype(np.uint16)
    nibbles = codes[:, :4] | codes[:, 4:] << np.uint16(2)
    shifts = np.array([0, 8, 4, 12], np.uint16)  # of weights 0, 1, 2, 3
    return np.bitwise_or.reduce(nibbles << shifts, axis=1)


def tables() -> Iterator[tuple[str, str, NDArray[np.unsignedinteger]]]:
    """Yield the name of each table, the type of its words, and the words."""
    for name in ("iq3_xxs", "iq3_s"):
        yield name, "u32", bytes_of(name).view("<u4")[:, 0]
    for name in ("iq2_xxs", "iq2_xs", "iq2_s"):
        yield name, "u64", bytes_of(name).view("<u8")[:, 0]
    yield "iq1", "u16", pairs_of_bits(grid("iq1_s"))


def header() -> str:
    """Return the text of the file."""
    text = [HEAD]
    for name, kind, words in tables():
        text.append(f"GRID_TABLE {kind} {name.upper()}_GRID[{len(words)}] = {{\n")
        digits = words.itemsize * 2
        each = 117 // (digits + 4)
        for i in range(0, len(words), each):
            text.append("    " + ", ".join(f"0x{word:0{digits}x}" for word in words[i : i + each].tolist()) + ",\n")
        text.append("};\n")
    return "".join(text)


def main() -> int:
    """Write the file, or compare it."""
    if "--check" in sys.argv[1:]:
        current = HEADER.is_file() and HEADER.read_text() == header()
        print(f"{HEADER.name} is {'current' if current else 'not current: run python .ci/quant_grids.py'}.")
        return not current
    HEADER.write_text(header())
    return 0


if __name__ == "__main__":
    sys.exit(main())
