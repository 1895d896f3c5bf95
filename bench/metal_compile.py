"""Compiles every kernel with Apple's tools, for all GPUs: `python bench/metal_compile.py OUT`.

Needs a Mac with Xcode's Metal compiler, and no GPU. The first step compiles each file of kernels/ in each language
version, with all warnings. The second makes a metallib. The third makes machine code of every kernel for every Apple
GPU (`metal-tt`, which reads a script of pipelines). A step goes on after a failure, so that one run has all messages.
OUT holds the metallib, the archives and `messages.json`: step, status and the tool's message. Exit status 1: a kernel
was refused.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

KERNELS = Path(__file__).parents[1] / "kernels"
SHIPPED = "metal3.1"  # as in csrc/metal and cmake/Metal.cmake
LANGUAGES = (SHIPPED, "metal3.2", "metal4.0")
TENSORS = "metal4.0-tensors"  # with tensor operations: zincmetal_4.metallib
OPTIONS = ("-mmacosx-version-min=14.0", "-fno-fast-math", "-Weverything", "-Wno-c++98-compat", "-Wno-c++17-extensions")
# GPUs by Apple's names: g is the base chip, s Pro and Max. A compiler knows the GPUs up to its own year.
GPUS = {
    "M1": ("applegpu_g13g", "applegpu_g13s"),
    "M2": ("applegpu_g14g", "applegpu_g14s"),
    "M3": ("applegpu_g15g", "applegpu_g15s"),
    "M4": ("applegpu_g16g", "applegpu_g16s"),
    "M5": ("applegpu_g17g", "applegpu_g17s"),
}
# The tools' messages about a language version or GPU that they do not know.
UNKNOWN = re.compile(r"invalid value|(unknown|unsupported|invalid|unrecognized) (target |gpu )?arch", re.IGNORECASE)
LABEL = "zincmetal"
LIBRARY, LIBRARY_4 = "zincmetal.metallib", "zincmetal_4.metallib"


@dataclass(frozen=True)
class Message:
    """Message of a tool. ``step`` names its work. ``status`` is its exit status."""

    step: str
    status: int
    words: str


def main(argv: Sequence[str] | None = None) -> int:
    """Compiles everything; returns the exit status."""
    args = parser().parse_args(argv)
    out: Path = args.out
    out.mkdir(parents=True, exist_ok=True)
    messages: list[Message] = []
    for message in steps(out, sorted(KERNELS.glob("*.metal")), args.kernels):
        messages.append(message)
        print(line(message), flush=True)
        (out / "messages.json").write_text(json.dumps([asdict(m) for m in messages], indent=1) + "\n")
    return 1 if any(refused(m) for m in messages) else 0


def parser() -> argparse.ArgumentParser:
    """Makes the parser of the command line."""
    p = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    p.add_argument("out", type=Path, metavar="OUT", help="folder for the results")
    p.add_argument("--kernels", nargs="*", metavar="NAME", help="machine code of these alone (default: all)")
    return p


def kernel_names() -> list[str]:
    """Lists every kernel by the table in the CPU's build of the same sources."""
    from zincmetal.device import backend

    device = backend.load("cpu").Device(native=False)
    return sorted(device.kernel_names())


def pipelines_script(names: Iterable[str], library: str = LIBRARY) -> dict[str, Any]:
    """Makes the script of these kernels' pipelines for `metal-tt` (.mtlp-json)."""
    return {
        "libraries": {"paths": [{"label": LABEL, "path": f"./{library}"}]},
        "pipelines": {"compute_pipelines": [{"compute_function": f"alias:{LABEL}#{name}"} for name in names]},
    }


def steps(out: Path, sources: Sequence[Path], kernels: Sequence[str] | None) -> Iterator[Message]:
    """Runs the steps; yields each message. The first step does not need zincmetal to be installed."""
    jobs = [(language, source) for language in (*LANGUAGES, TENSORS) for source in sources]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield from pool.map(lambda job: compile_source(out, *job), jobs)
    try:
        names = kernels or kernel_names()
    except ImportError as error:
        yield Message("names of kernels", 1, f"{error}; install zincmetal for machine code")
        return
    yield from machine_code(out, sources, SHIPPED, LIBRARY, [n for n in names if "_coop_" not in n], [*GPUS])
    yield from machine_code(out, sources, TENSORS, LIBRARY_4, [n for n in names if "_coop_" in n], ["M5"])


def machine_code(
    out: Path, sources: Sequence[Path], language: str, library: str, names: Sequence[str], chips: Sequence[str]
) -> Iterator[Message]:
    """Makes a metallib of what was compiled in a language, and the machine code of these kernels for these chips."""
    airs = [path for source in sources if (path := air(out, language, source)).exists()]
    if not airs and language != SHIPPED:
        return  # these tools do not know it, as they have said
    made = tool(f"{language} metallib", "metallib", *map(str, airs), "-o", library, cwd=out)
    yield made
    if made.status == 0 and names:
        script = library.replace(".metallib", ".mtlp-json")
        (out / script).write_text(json.dumps(pipelines_script(names, library), indent=1) + "\n")
        gpus = [(chip, gpu) for chip in chips for gpu in GPUS[chip]]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            yield from pool.map(lambda of: translate(out, of[0], of[1], library), gpus)


def compile_source(out: Path, language: str, source: Path) -> Message:
    """Compiles a source file to Apple's intermediate representation."""
    target = air(out, language, source)
    target.parent.mkdir(exist_ok=True)
    step, version = f"{language} {source.name}", language.split("-")[0]
    tensors = ("-DCOOPERATIVE=1", "-mmacosx-version-min=26.0") if language == TENSORS else ()
    return tool(step, "metal", f"-std={version}", *OPTIONS, *tensors, "-c", str(source), "-o", str(target))


def air(out: Path, language: str, source: Path) -> Path:
    """Returns the path of the compiled source."""
    return out / language / f"{source.stem}.air"


def translate(out: Path, chip: str, gpu: str, library: str) -> Message:
    """Makes machine code of every pipeline of a library's script, for one GPU."""
    inputs, of = (library, library.replace(".metallib", ".mtlp-json")), "" if library == LIBRARY else "_4"
    return tool(f"{chip}{of} {gpu}", "metal-tt", "-arch", gpu, *inputs, "-o", f"{gpu}{of}.binary.metallib", cwd=out)


def tool(step: str, name: str, *args: str, cwd: Path | None = None) -> Message:
    """Runs one of Xcode's tools."""
    command = ["xcrun", "-sdk", "macosx", name, *args]
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, errors="replace", check=False)
    except OSError as error:
        return Message(step, 127, f"xcrun: {error}")
    return Message(step, done.returncode, (done.stdout + done.stderr).strip())


def refused(message: Message) -> bool:
    """Return True if a kernel was refused. An unknown language version or GPU is not the kernel's fault."""
    optional = not message.step.startswith(SHIPPED)
    return message.status != 0 and not (optional and UNKNOWN.search(message.words))


def line(message: Message) -> str:
    """Formats a message for the log."""
    how = "ok" if message.status == 0 else "REFUSED" if refused(message) else "not known to these tools"
    return "\n    ".join([f"{message.step}: {how}", *message.words.splitlines()])


if __name__ == "__main__":
    sys.exit(main())
