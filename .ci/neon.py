"""Runs tests of the CPU lane as 64-bit Arm machines run them: ``python .ci/neon.py [CPU ...] [-- PYTEST ARGUMENTS]``.

Debian's cross compiler builds the core, and QEMU runs it with Debian's Python for Arm, all in build/neon. A CPU is a
name that ``qemu-aarch64-static -cpu help`` lists. Arguments for pytest replace the usual tests.
"""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from pip._vendor import tomli
from tree import ROOT, environment, packaged

FOLDER = ROOT / "build" / "neon"
SYSTEM = FOLDER / "root"  # what lies in / on that machine
PYTHON = SYSTEM / "usr" / "bin" / "emulated-python"
EMULATOR, COMPILER = "qemu-aarch64-static", "aarch64-linux-gnu-g++"
TOOLS = {
    "apt-get": "apt",
    "dpkg": "dpkg",
    COMPILER: "g++-aarch64-linux-gnu",
    EMULATOR: "qemu-user-static",
}
#: What Debian has for Arm, and Python's packages beside those that zincmetal needs.
DEBIAN = ("python3", "libpython3-dev", "libstdc++6")
PYPI = ("pytest>=8", "hypothesis>=6", "gguf>=0.10")
MODULES = ("_host", "_core_cpu")

#: Every native kernel, and every type and form of it that the tests know. One type of the Metal text: the rest of it is
#: portable C++. Whole models: exact distributions of small files, and real text.
USUAL = (
    ("tests/csrc/cpu/test_native.py", "tests/kernels", "-k", "native and not lesser"),
    ("tests/kernels", "-k", "msl and q8_0"),
    ("tests/test_tiny.py", "tests/models/test_models.py", "-k", "tiny or (native and prefix) or (writes and 0)"),
)
#: Further processors run the same code: some families are enough.
SHORT = (("tests/kernels/test_rows.py", "tests/kernels/test_products_heads.py", "-k", "native"),)
OLDEST = "cortex-a72"  # of a Raspberry Pi 4: ARMv8.0 alone
CPUS = (OLDEST, "neoverse-n1", "max")

#: Instructions of some later processors, with the options that the assembler wants.
LATER = {"sdot v0.4s, v1.16b, v2.16b": "armv8.2-a+dotprod", "fadd v0.8h, v1.8h, v2.8h": "armv8.2-a+fp16"}


def need_tools() -> None:
    """Ends the script where a tool is missing, with its package."""
    missing = [package for tool, package in TOOLS.items() if shutil.which(tool) is None]
    if missing:
        sys.exit(f"tools are missing: on Debian, apt install {' '.join(missing)}")


def run(*command: str | Path, **options: object) -> None:
    """Runs a command that must succeed."""
    subprocess.run([str(word) for word in command], check=True, **options)  # type: ignore[call-overload]


# ---- Python for Arm --------------------------------------------------------------------------------------------------


def fetch_debian() -> None:
    """Unpacks Debian's Python for Arm. The lists of packages are kept apart from those of this system."""
    apt = FOLDER / "apt"
    for name in ("state/lists/partial", "cache/archives/partial"):
        (apt / name).mkdir(parents=True, exist_ok=True)
    options = {
        "APT::Architecture": "arm64",
        "APT::Architectures::": "arm64",
        "APT::Sandbox::User": "",  # a file of the user's need not be readable by another
        "Dir::State": str(apt / "state"),
        "Dir::State::status": "/dev/null",  # nothing is installed there
        "Dir::Cache": str(apt / "cache"),
    }
    get = ["apt-get", "-qq", *(word for key, value in options.items() for word in ("-o", f"{key}={value}"))]
    run(*get, "update")
    run(*get, "install", "--yes", "--download-only", "--no-install-recommends", *DEBIAN)
    for archive in sorted((apt / "cache" / "archives").glob("*.deb")):
        run("dpkg", "-x", archive, SYSTEM)


def write_launcher() -> None:
    """Writes the program that is Python there. It calls itself by its own name, so that tests can start it again."""
    real = SYSTEM / "usr" / "bin" / "python3"
    PYTHON.write_text(f'#!/bin/sh\nexec {EMULATOR} -L "{SYSTEM}" -0 "$0" "{real}" "$@"\n')
    PYTHON.chmod(0o755)


def fetch_packages() -> None:
    """Unpacks Python's packages for Arm, and the demo model."""
    version = (SYSTEM / "usr" / "bin" / "python3").resolve().name.removeprefix("python")
    project = tomli.loads((ROOT / "pyproject.toml").read_text())["project"]
    platforms = [f"--platform=manylinux{tag}_aarch64" for tag in ("_2_28", "_2_17", "2014")]
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", "install", "--only-binary=:all:"]
    place = [
        "--target",
        SYSTEM / "usr" / "lib" / "python3" / "dist-packages",
        f"--python-version={version}",
        *platforms,
    ]
    run(*pip, *place, *project["dependencies"], *PYPI)
    run(*pip, *place, "--no-deps", *project["optional-dependencies"]["demo"])


def fetch() -> None:
    """Fetches what is not there."""
    filled = FOLDER / "filled"
    if not filled.exists():
        shutil.rmtree(SYSTEM, ignore_errors=True)
        SYSTEM.mkdir(parents=True)
        fetch_debian()
        write_launcher()
        fetch_packages()
        filled.touch()


# ---- the core --------------------------------------------------------------------------------------------------------


def build() -> Path:
    """Builds the modules, and returns a folder with the package of this tree around them."""
    pybind = subprocess.check_output([sys.executable, "-m", "pybind11", "--cmakedir"], text=True).strip()
    headers = next((SYSTEM / "usr" / "include").glob("python3.*"))
    settings = {
        "CMAKE_TOOLCHAIN_FILE": ROOT / "cmake" / "Arm64Linux.cmake",
        "ARM64_ROOT": SYSTEM,
        "Python_EXECUTABLE": PYTHON,
        "Python_INCLUDE_DIR": headers,
        "pybind11_DIR": pybind,
    }
    core = FOLDER / "core"
    configure = ["cmake", "-S", ROOT, "-B", core, "-G", "Ninja", *(f"-D{k}={v}" for k, v in settings.items())]
    run(*configure, stdout=subprocess.DEVNULL)
    run("cmake", "--build", core, "--target", *MODULES)
    return packaged(core)


# ---- tests -----------------------------------------------------------------------------------------------------------


def runs(instruction: str, options: str, cpu: str) -> bool:
    """Tells whether an emulated processor has an instruction."""
    program = FOLDER / "instruction"
    source = f'int main() {{ asm volatile("{instruction}"); }}'
    run(COMPILER, f"-march={options}", "-x", "c++", "-", "-o", program, input=source.encode())
    emulated = [EMULATOR, "-cpu", cpu, "-L", str(SYSTEM), str(program)]
    status = subprocess.run(emulated, stderr=subprocess.DEVNULL).returncode
    if status not in (0, -signal.SIGILL):
        sys.exit(f"{EMULATOR} -cpu {cpu}: a program of the instruction {instruction} ended with status {status}")
    return status == 0


def test(cpu: str, arguments: Sequence[str]) -> int:
    """Runs pytest on an emulated processor; returns its status."""
    # What the environment says of this machine's processor means nothing to that one's OpenBLAS.
    env = {k: v for k, v in environment(FOLDER / "core" / "package").items() if not k.startswith("OPENBLAS")}
    env |= {"QEMU_CPU": cpu, "OPENBLAS_NUM_THREADS": "1"}
    command = [str(PYTHON), "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, cwd=ROOT, env=env).returncode


def main(arguments: list[str]) -> int:
    """Fetches, builds and tests; returns 1 if a test fails."""
    at = arguments.index("--") if "--" in arguments else len(arguments)
    cpus, chosen = arguments[:at], arguments[at + 1 :]
    need_tools()
    fetch()
    build()
    failed = 0
    for cpu in cpus or CPUS:
        has = [word for word, options in LATER.items() if runs(word, options, cpu)]
        if has and cpu == OLDEST:
            sys.exit(
                f"{EMULATOR} does not stop a {cpu} at {has[0]}: its tests would not show that kernels need no more"
            )
        print(f"== {cpu}, with {len(has)} of {len(LATER)} instructions of later processors", flush=True)
        for each in [chosen] if chosen else USUAL if cpu == OLDEST else SHORT:
            failed |= test(cpu, each)
    return int(failed != 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
