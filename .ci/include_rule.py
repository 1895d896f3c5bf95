"""Checks who includes whom: prints each include that a room of csrc/ or kernels/ may not have, and exits with 1.

Usage: python .ci/include_rule.py [ROOT]
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

#: Room: the rooms that its files may include. Backends do not know each other, and core/ knows no backend.
ROOMS = {
    "kernels": {"kernels"},
    "csrc/core": {"csrc/core", "kernels"},
    "csrc/host": {"csrc/host", "csrc/core"},
    "csrc/msl/stdlib": {"csrc/msl/stdlib", "csrc/msl/run"},
    "csrc/msl/run": {"csrc/msl/run"},
    "csrc/cpu": {"csrc/cpu", "csrc/core", "csrc/msl/run", "kernels"},
    "csrc/cuda": {"csrc/cuda", "csrc/core", "csrc/msl/run"},
    "csrc/metal/portable": {"csrc/metal/portable", "csrc/core"},
    "csrc/metal": {"csrc/metal", "csrc/metal/portable", "csrc/core"},
}
#: Library header: the rooms or files that alone may include it.
LIBRARIES = {
    r"(Foundation|Metal|objc|mach-o)/|pthread/qos": {"csrc/metal"},
    r"cuda": {"csrc/cuda", "csrc/msl/stdlib"},
    r"pybind11/": {"csrc/core/bind.cpp", "csrc/core/interrupt.h"},
    r"Python\.h": {"csrc/core/gil.h", "csrc/host/host.cpp"},
}
KERNEL_LIBRARIES = {
    "metal_stdlib",
    "metal_tensor",
    "MetalPerformancePrimitives/MetalPerformancePrimitives.h",
    "cstdint",
}
INCLUDE = re.compile(r'^\s*#\s*(?:include|import)\s*(?:"([^"]+)"|<([^>]+)>)', re.MULTILINE)


def room_of(path: str) -> str:
    """The room of a file: the longest one that its path begins with, or the folder of the file."""
    rooms = [room for room in ROOMS if path.startswith(room + "/")]
    return max(rooms, key=len, default=path.rpartition("/")[0])


def violations(root: Path) -> Iterator[str]:
    """Yields "file: include: reason" for each include that breaks the rule."""
    sources = [p for top in ("csrc", "kernels") for p in sorted((root / top).rglob("*")) if p.is_file()]
    for source in sources:
        path = source.relative_to(root).as_posix()
        room = room_of(path)
        if room not in ROOMS:
            yield f"{path}: is in no room; add the folder to ROOMS"
            continue
        for own, library in INCLUDE.findall(source.read_text()):
            places = (source.parent / own, root / "csrc" / own, root / "kernels" / own)
            target = next((p.resolve().relative_to(root).as_posix() for p in places if own and p.is_file()), "")
            if own and not target:
                yield f'{path}: "{own}": there is no such file'
            elif own and room_of(target) not in ROOMS[room]:
                yield f'{path}: "{own}": {room}/ may include {", ".join(sorted(ROOMS[room]))} only'
            elif library and room == "kernels" and library not in KERNEL_LIBRARIES:
                yield f"{path}: <{library}>: kernels/ may include Metal's headers only"
            for pattern, allowed in LIBRARIES.items():
                if re.match(pattern, library) and not allowed & {room, path}:
                    yield f"{path}: <{library}>: only {', '.join(sorted(allowed))} may include it"


if __name__ == "__main__":
    found = list(violations(Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parents[1]).resolve()))
    print(*found or ["Includes keep to their rooms."], sep="\n")
    sys.exit(bool(found))
