"""Builds the core with sanitizers and runs tests of core, scheduler and models on it: ``python .ci/sanitize.py KIND``.

KIND is ``address`` (AddressSanitizer and UndefinedBehaviorSanitizer; then LeakSanitizer over cycles of load and close)
or ``thread`` (ThreadSanitizer). Other arguments go to pytest, not the usual tests. It needs g++, cmake, ninja.
No report of our own code is suppressed.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tree import ROOT, environment, packaged

MODULES = ("_host", "_core_cpu")
TESTS = (
    "tests/csrc/core",
    "tests/csrc/cpu/test_device_cpu.py",
    "tests/device",
    "tests/engine",
    "tests/gguf",
    "tests/models/test_models.py",
    "tests/fuzz",
)
#: Tests that the tools cannot run with: they replace the allocator, expect that a signal ends a process as it does
#: without a sanitizer, or wait for hundreds of large products.
WITHOUT = (
    "test_any_call_of_the_system_may_fail",
    "test_a_step_hears_signals",
    "test_memory_may_end_at_any_allocation",
    "test_faults_elsewhere_end_the_process_as_ever",
)
LIBRARY = {"address": "libasan.so", "thread": "libtsan.so"}
OPTIONS = {
    # Python keeps what it allocates until it ends. Leaks are looked for where they can be told from that.
    "ASAN_OPTIONS": "detect_leaks=0:handle_sigbus=0:handle_segv=0:allocator_may_return_null=1:abort_on_error=1",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1:exitcode=66:second_deadlock_stack=1",
    "PYTHONMALLOC": "malloc",
}


def build(kind: str) -> Path:
    """Builds the modules, and returns a folder with the package of this tree around them."""
    folder = ROOT / "build" / f"sanitize-{kind}"
    pybind = subprocess.check_output([sys.executable, "-m", "pybind11", "--cmakedir"], text=True).strip()
    settings = [f"-DZINCMETAL_SANITIZE={kind}", f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind}"]
    configure = ["cmake", "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release", *settings]
    subprocess.run(configure, check=True, stdout=subprocess.DEVNULL)
    subprocess.run(["cmake", "--build", str(folder), "--target", *MODULES], check=True)
    return packaged(folder)


def sanitized(kind: str, built: Path) -> dict[str, str]:
    """Variables of a Python that the sanitizer's library is loaded into first."""
    # The sanitizer looks for the C++ library when the process starts, and Python itself does not load it.
    libraries = [
        subprocess.check_output(["g++", f"-print-file-name={name}"], text=True).strip()
        for name in (LIBRARY[kind], "libstdc++.so.6")
    ]
    return environment(built, **OPTIONS, LD_PRELOAD=" ".join(libraries))


def main(kind: str, arguments: list[str]) -> int:
    """Builds, runs the tests, and looks for leaks."""
    env = sanitized(kind, build(kind))
    chosen = arguments or [*TESTS, "-k", " and ".join(f"not {name}" for name in WITHOUT)]
    tests = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", *chosen]
    failed = subprocess.run(tests, env=env, cwd=ROOT).returncode
    if kind == "address" and not arguments:
        leaks = [sys.executable, "-m", "support.leak_cycles"]
        env["ASAN_OPTIONS"] = OPTIONS["ASAN_OPTIONS"].replace("detect_leaks=0", "detect_leaks=1:leak_check_at_exit=0")
        failed |= subprocess.run(leaks, env=env, cwd=ROOT).returncode
        planted = subprocess.run([*leaks, "--plant"], env=env, cwd=ROOT, capture_output=True)
        if planted.returncode != 1:
            print("a leak that was planted was not found")
            failed = 1
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
