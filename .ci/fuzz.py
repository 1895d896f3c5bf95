"""Fuzzes each harness for a share of the time: ``python .ci/fuzz.py SECONDS [NAME ...]``. It needs atheris.

The C++ harness is built if there is a clang++ with libFuzzer. Inputs are kept in ``build/fuzz``, and with them the
number of executions so far. As many harnesses run at once as there are cores. An input that fails is named, and the
exit status is 1.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

from tree import ROOT, environment

sys.path.insert(0, str(ROOT / "tests"))

from support.fuzz import NAMES

FOLDER = ROOT / "build" / "fuzz"
HOST = "host_maps"  # tests/fuzz/host.cpp
LIMITS = ["-timeout=10", "-rss_limit_mb=1024", "-len_control=20"]
#: Bytes of an input: 2,048, or as many as a harness reads.
LENGTHS = {"gguf_files": 4096, "hostile_plans": 512, "cache_files": 1024, "scheduling": 512, HOST: 300}


def command(name: str) -> list[str]:
    """The program of a harness, without options. Builds that of C++."""
    if name != HOST:
        return [sys.executable, "-m", "support.fuzz", name, str(FOLDER / name)]
    program = FOLDER / "host"
    flags = ["-std=c++20", "-g", "-O1", "-fsanitize=fuzzer,address,undefined", f"-I{ROOT / 'csrc'}"]
    sources = [ROOT / "tests" / "fuzz" / "host.cpp", ROOT / "csrc" / "host" / "bus_guard.cpp"]
    subprocess.run(["clang++", *flags, *map(str, sources), "-o", str(program)], check=True)
    return [str(program), "-handle_bus=0", str(FOLDER / name)]


def fuzz(name: str, seconds: int) -> tuple[int, str]:
    """Runs a harness. Returns the number of executions, and the end of what a failure says."""
    (FOLDER / name).mkdir(parents=True, exist_ok=True)
    options = [
        f"-max_total_time={seconds}",
        f"-max_len={LENGTHS.get(name, 2048)}",
        f"-artifact_prefix={FOLDER}/{name}-",
    ]
    env = environment(ASAN_OPTIONS="handle_sigbus=0")
    done = subprocess.run(
        [*command(name), *LIMITS, *options], env=env, capture_output=True, text=True, errors="replace"
    )
    counts = re.findall(r"^(?:Done |#)(\d+)", done.stderr, re.MULTILINE)
    failed = "" if done.returncode == 0 else (done.stdout + done.stderr)[-3000:]
    return int(counts[-1]) if counts else 0, failed


def main(seconds: int, chosen: list[str]) -> int:
    """Fuzzes the chosen harnesses, or all, and shows the counts."""
    names = chosen or [*NAMES, *([HOST] if shutil.which("clang++") else [])]
    FOLDER.mkdir(parents=True, exist_ok=True)
    file = FOLDER / "executions.json"
    total: dict[str, int] = json.loads(file.read_text()) if file.exists() else {}
    wrong = 0
    at_once = min(len(names), os.cpu_count() or 1)
    with ThreadPoolExecutor(at_once) as pool:
        done = pool.map(lambda name: fuzz(name, max(1, seconds * at_once // len(names))), names)
        for name, (count, failed) in zip(names, done, strict=True):
            total[name] = total.get(name, 0) + count
            file.write_text(json.dumps(total, indent=1) + "\n")
            print(
                f"{name:16} {count:>10,} executions, {total[name]:>12,} so far{' FAILED' if failed else ''}", flush=True
            )
            print(failed, end="")
            wrong += bool(failed)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
