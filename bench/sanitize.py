"""Runs compute-sanitizer over every kernel, and over a whole prefill and decode, on an NVIDIA GPU.

    python bench/sanitize.py --out results      # a log of each tool and workload; the table comes last

Each tool (memcheck, racecheck, synccheck, initcheck) watches three workloads, at once in separate processes. "kernels"
runs every kernel that a plan can launch, in the small cases of `zincmetal check`. The buffers have exactly the bytes
that it may touch, and outputs are unwritten. "model" runs a prefill of 70 tokens, two decoded tokens, and three sampled
sequences at once, of the hybrid fixture. "planted" runs a faulty kernel of tests/csrc/msl/probes/probe_faults.metal,
which the tool must report. It needs a build with ZINCMETAL_PROBES=ON. The exit status is 1 if a tool reports anything
on the first two workloads, or misses a planted fault, or if a kernel did not run.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from zincmetal import _core
    from zincmetal.check.cases import Scene
    from zincmetal.device.core import Core

ROOT = Path(__file__).parent.parent
TESTS = ROOT / "tests"
FIXTURE = TESTS / "data" / "qwen35moe-q4k-q5k-q8.gguf"
#: The fault that each tool must find with the workload "planted": a kernel, and whether its input is written.
PLANTED = {
    "memcheck": ("probe_fault_READ_PAST_END", True),
    "racecheck": ("probe_fault_NO_BARRIER", True),
    "synccheck": ("probe_fault_BARRIER_NOT_REACHED", True),
    "initcheck": ("probe_increment", False),
}
WORKLOADS = ("kernels", "model", "planted")
LAUNCHED = "launched: "


# ---- the workloads, each in a process of its own ------------------------------------------------------------------


def run_kernels(device: str) -> set[str]:
    """Runs every case of every kernel once; returns the names of the launched kernels."""
    from zincmetal.check.cases import cases, has_cooperative
    from zincmetal.device import backend

    core, opened = backend.open_device(device)
    found = cases(core, cooperative=has_cooperative(opened.kernel_names()))
    scenes = {id(case.scene): case.scene for case in found.values()}
    for seed, scene in enumerate(scenes.values()):
        run_scene(core, opened, scene, seed)
    return {launch.kernel for scene in scenes.values() for launch in scene.launches}


def run_scene(core: Core, opened: _core.Device, scene: Scene, seed: int) -> None:
    """Runs the launches of a scene, each behind a barrier. The host writes only the buffers that are read first."""
    from zincmetal.device.core import BoundDispatch

    memory, buffers = scene.memory(core, seed), dict[str, "_core.Buffer"]()
    dispatches = []
    for launch in scene.launches:
        for arg in launch.args:
            name = arg.operand.name
            if name not in buffers:
                buffers[name] = opened.alloc(memory[name].size)
                if "r" in arg.mode:
                    buffers[name].write(memory[name])
        bindings = [
            (buffers[arg.operand.name], 4 * arg.first, memory[arg.operand.name].size - 4 * arg.first)
            for arg in launch.args
        ]
        dispatches.append(BoundDispatch.of(launch, bindings, barrier=True))
    opened.run(dispatches)


def run_model(device: str) -> set[str]:
    """Runs a prefill and two tokens of the fixture, and three sequences at once; returns the kernels of all plans."""
    import zincmetal

    with zincmetal.load(FIXTURE, context=128, device=device) as model:
        ids = (np.arange(70) * 31 % model.config.n_vocab).tolist()
        with model.session() as session:
            token = session.prefill(ids)
            tokens = [token := session.decode(token) for _ in range(2)]
        prompts = [ids[:n] for n in (5, 20, 41)]
        sampled = model.generate(prompts, 3, temperature=0.9, top_p=0.95, repeat_penalty=1.1, seed=1)
        print(f"tokens {tokens} {[result.tokens for result in sampled]}")
        return {d.launch.kernel for program in model.engine.programs.made.values() for d in program.plan.dispatches}


def run_planted(device: str, tool: str) -> set[str]:
    """Runs the kernel that the tool must report, on buffers of exactly the bytes that a correct kernel needs."""
    from zincmetal.device import backend
    from zincmetal.device.core import BoundDispatch

    kernel, written = PLANTED[tool]
    _, opened = backend.open_device(device)
    n = 64
    source, out = opened.alloc(4 * n), opened.alloc(4 * n)
    if written:
        source.write(np.arange(n, dtype=np.float32))
    out.write(np.zeros(n, np.float32))
    params = np.array([n, 0], np.uint32).tobytes()
    opened.run([BoundDispatch(kernel, params, [(source, 0, 4 * n), (out, 0, 4 * n)], (1, 1, 1), n, False)])
    return {kernel}


# ---- one tool on one workload -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """Outcome of a tool's run. ``reports`` is None if the tool wrote no summary."""

    tool: str
    workload: str
    reports: int | None
    status: int | None  # None: it ran out of time
    seconds: float
    launched: frozenset[str]

    @property
    def good(self) -> bool:
        """True if nothing was reported and nothing failed; for a planted fault, whether it was reported."""
        if self.workload == "planted":
            return bool(self.reports)
        return self.reports == 0 and self.status == 0

    def line(self) -> str:
        """Formats a row of the table."""
        ended = "out of time" if self.status is None else "ended" if self.status == 0 else f"status {self.status}"
        found = "no summary" if self.reports is None else f"{self.reports} reports"
        verdict = "ok" if self.good else "MISSED" if self.workload == "planted" else "FAILED"
        return f"{self.tool:<11}{self.workload:<10}{found:>14}{ended:>14}{self.seconds:>8.1f} s  {verdict}"


def reports_in(log: str) -> int | None:
    """Reads the counts of the tool's last summary: errors, and racecheck's hazards. None: there is no summary."""
    errors = re.findall(r"ERROR SUMMARY: (\d+) error", log)
    hazards = re.findall(r"RACECHECK SUMMARY: (\d+) hazards? displayed", log)
    counts = [max(map(int, found)) for found in (errors, hazards) if found]
    return sum(counts) if counts else None


def watch(tool: str, workload: str, args: argparse.Namespace) -> Outcome:
    """Runs the tool on the workload, with a log in the folder of results."""
    command = [args.sanitizer, "--tool", tool, "--print-limit", "20"]
    if tool == "initcheck":  # the host copies whole buffers; kernels wrote only the rows of the step's tokens
        command += ["--check-api-memory-access", "no"]
    command += [sys.executable, __file__, "--work", workload, "--tool", tool, "--device", args.device]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])}
    path = args.out / f"{tool}-{workload}.log"
    began, status = time.perf_counter(), None
    with path.open("w") as log:
        child = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=env, cwd=ROOT, start_new_session=True
        )
        try:
            status = child.wait(args.limit)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)  # the tool and the process that it watches
            child.wait()
    text = path.read_text(errors="replace")
    launched = re.findall(rf"^{LAUNCHED}(.*)$", text, re.M)
    names = frozenset(json.loads(launched[-1])) if launched else frozenset[str]()
    return Outcome(tool, workload, reports_in(text), status, time.perf_counter() - began, names)


def main() -> int:
    """Watches everything and prints the table; returns the exit status."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, default=Path("sanitizer"), help="folder for the logs")
    p.add_argument("--limit", type=float, default=240, help="seconds of a tool on a workload")
    p.add_argument("--jobs", type=int, default=12, help="processes at a time")
    p.add_argument("--tools", nargs="+", choices=PLANTED, default=list(PLANTED))
    p.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    p.add_argument("--sanitizer", default=shutil.which("compute-sanitizer"), metavar="PROGRAM")
    p.add_argument("--device", default="cuda")
    p.add_argument("--work", choices=WORKLOADS, help="run one workload, unwatched")
    p.add_argument("--tool", choices=PLANTED, default="memcheck", help="whose fault is planted, with --work")
    args = p.parse_args()
    if args.work:
        return work(args)
    if not args.sanitizer:
        print("compute-sanitizer is not installed (it comes with the CUDA toolkit): nothing was checked")
        return 1
    args.out.mkdir(parents=True, exist_ok=True)
    pairs = [(tool, workload) for workload in args.workloads for tool in args.tools]
    with ThreadPoolExecutor(args.jobs) as pool:
        outcomes = list(pool.map(lambda pair: watch(pair[0], pair[1], args), pairs))
    return tell(outcomes, built_kernels(args), args)


def work(args: argparse.Namespace) -> int:
    """Runs one workload."""
    if args.work == "planted":
        launched = run_planted(args.device, args.tool)
    else:
        launched = run_kernels(args.device) if args.work == "kernels" else run_model(args.device)
    print(f"{LAUNCHED}{json.dumps(sorted(launched))}", flush=True)
    return 0


def built_kernels(args: argparse.Namespace) -> list[str]:
    """Lists the device's kernels, asked in a process of its own."""
    ask = f"from zincmetal.device import backend; print(*backend.open_device({args.device!r})[1].kernel_names())"
    return subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True).stdout.split()


def kernels_missing(launched: Iterable[str], built: Iterable[str]) -> list[str]:
    """Lists the built kernels that did not run, without planted faults and numbers of rows that no plan has."""
    return sorted(k for k in set(built) - set(launched) if not k.startswith("probe_") and not re.search(r"_r\d+$", k))


def tell(outcomes: list[Outcome], built: list[str], args: argparse.Namespace) -> int:
    """Prints the table and the kernels that did not run; returns the exit status."""
    good = all(outcome.good for outcome in outcomes)
    for outcome in outcomes:
        print(outcome.line())
    if "kernels" in args.workloads:
        for tool in args.tools:
            launched = set().union(*(o.launched for o in outcomes if o.tool == tool and o.workload != "planted"))
            missing = kernels_missing(launched, built)
            good = good and not missing
            print(f"{tool}: {len(launched)} kernels ran" + (f", but not {', '.join(missing)}" if missing else ", all"))
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
