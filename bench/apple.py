"""Projects the tokens a second of a model file on M1 to M5: `python bench/apple.py FILE.gguf [--compiled]`.

No Mac was measured for this: every figure that it prints is a projection. A step's time is the sum over its dispatches
of the longest of three times, and of what a dispatch behind a barrier costs:

- its bytes (``measure/costs.py``) by the share of the memory's bandwidth that its simdgroups in flight can ask for;
- the work of vector units: slots for each weight that is decoded and multiplied;
- the work of matrix units, if its kernel multiplies matrices.

Each number has two bounds, and so has the result. ``--compiled`` takes the registers and the threadgroup memory of each
kernel, which decide how many simdgroups a core holds, from LLVM IR (needs the PyPI package ziglang). Without it a core
is full. A file of `bench/synthetic.py --empty` will do.

Sources. Bandwidth and cores: Apple's specifications. Clocks, 128 lanes, 102 multiply-adds a cycle of simdgroup
matrices, 208 KB of registers and 60 KB of threadgroup memory a core, and 24 simdgroups to fill it:
philipturner/metal-benchmarks. Matrix units of M5: four times the vector units of M4, as Apple says. A dispatch behind a
barrier: 1.2 us (M3 Pro) and 2.05 us, as others measured. Slots a weight: counted in the text of the kernels.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

from zincmetal import gguf
from zincmetal.device import backend
from zincmetal.measure.costs import Cost, Costs
from zincmetal.plan.chunks import ONE_ROW, chunk_shape
from zincmetal.plan.plan import Dispatch, Plan
from zincmetal.plan.planner import Planner
from zincmetal.plan.target import Target

LANES = 128  # of a core: slots a cycle
FULL = 24  # simdgroups that fill a core's vector units
FULL_OF_MATRICES = 12  # the same of its matrix units: each simdgroup has several sums under way
IN_FLIGHT = 8  # simdgroups of a core whose loads are the bandwidth: 512 bytes each within 400 cycles
REGISTER_BYTES, THREADGROUP_BYTES = 208 << 10, 60 << 10  # of a core
PROMPT = 512  # tokens
#: Slots of a vector unit for each weight that one row meets, by type; of others as of q4_k.
SLOTS = {"f32": 2.0, "f16": 3.0, "bf16": 3.0, "q8_0": 6.2, "q4_k": 11.0, "q5_k": 13.0, "q6_k": 16.0}
MATRIX_KERNELS = ("mul_mm", "moe_mm", "mul_heads_mm", "attention_prefill", "ssm_delta", "mul_few", "moe_few")


@dataclass(frozen=True)
class Machine:
    """Chip with its largest GPU. ``tensors``: it has matrix units of their own."""

    name: str
    cores: int
    gb_s: float
    ghz: float
    tensors: bool = False

    @property
    def cycles(self) -> float:
        """Cycles a second of all cores."""
        return self.cores * self.ghz * 1e9


MACHINES = (
    *(Machine(*of, 1.296) for of in (("M1", 8, 68), ("M1 Pro", 16, 205), ("M1 Max", 32, 410), ("M1 Ultra", 64, 819))),
    *(Machine(*of, 1.398) for of in (("M2", 10, 102), ("M2 Pro", 19, 205), ("M2 Max", 38, 410), ("M2 Ultra", 76, 819))),
    *(Machine(*of, 1.38) for of in (("M3", 10, 102), ("M3 Pro", 18, 154), ("M3 Max", 40, 410), ("M3 Ultra", 80, 819))),
    *(Machine(*of, 1.58) for of in (("M4", 10, 120), ("M4 Pro", 20, 273), ("M4 Max", 40, 546))),
    *(Machine(*of, 1.62, True) for of in (("M5", 10, 154), ("M5 Pro", 20, 307), ("M5 Max", 40, 614))),
)


@dataclass(frozen=True)
class Bound:
    """One end of what is not known: the share of the bandwidth that a full GPU gets, of the peak of matrix units that a
    full core reaches, and the seconds of a dispatch behind a barrier.
    """

    bandwidth: float
    matrices: float
    dispatch: float


WORST, BEST = Bound(0.70, 0.45, 2.05e-6), Bound(0.88, 0.75, 1.2e-6)

#: What others published, by the beginning of ``general.name`` or the architecture, and by machine: decode, prompts,
#: tokens/s; engine and file.
PUBLISHED: Mapping[str, Mapping[str, str]] = {
    "qwen35moe": {
        "M1 Pro": "llama.cpp 26",
        "M2 Max": "Rapid-MLX 4-bit 80",
        "M3 Max": "llama.cpp UD-Q4_K_M 66, prompts 1,575; MLX mxfp4 106",
        "M3 Ultra": "Rapid-MLX 4-bit 128",
        "M4 Pro": "llama.cpp Q5 36",
        "M4 Max": "llama.cpp UD-Q4_K_M 66-73; MLX 4-bit 102, prompts 1,518",
        "M5 Pro": "llama.cpp UD-Q4_K_M 69, prompts 1,968; oMLX 4-bit 86",
        "M5 Max": "llama.cpp UD-Q4_K_M 92; Lily (MLX 4-bit) 195, prompts 3,860",
    },
    "qwen35": {
        "M3 Max": "llama.cpp UD-Q4_K_M 16-17",
        "M4 Max": "llama.cpp 21-22",
        "M5 Pro": "llama.cpp UD-Q4_K_M 16-17",
        "M5 Max": "llama.cpp Q4_K_M 24-25",
    },
    "gpt-oss": {"M5 Max": "llama.cpp 122, prompts 1,236; gmlx 128, prompts 2,308"},
}


@dataclass(frozen=True)
class Resources:
    """What a kernel takes of a core: registers of 32 bits a thread, and bytes of a threadgroup's memory."""

    registers: int = 0
    threadgroup_bytes: int = 0

    def resident(self, threads: int) -> int:
        """Return how many simdgroups of threadgroups of so many threads a core holds, one threadgroup at least."""
        simdgroups = threads // 32
        groups = [1024 // 32 * 3 // simdgroups]
        if self.threadgroup_bytes:
            groups.append(THREADGROUP_BYTES // self.threadgroup_bytes)
        if self.registers:
            groups.append(REGISTER_BYTES // (4 * self.registers * threads))
        return max(1, min(groups)) * simdgroups


FULL_CORE = Resources()


def seconds(machine: Machine, d: Dispatch, cost: Cost, of: Resources, bound: Bound, rows: int) -> float:
    """Project the time of a dispatch in a step of ``rows`` rows."""
    launch = d.launch
    simdgroups = prod(launch.grid) * launch.threads // 32
    held = min(of.resident(launch.threads), -(-simdgroups // machine.cores))  # by a core, in the first wave
    cores = min(1.0, prod(launch.grid) / machine.cores)
    memory = cost.nbytes / (machine.gb_s * 1e9 * bound.bandwidth * min(1.0, held / IN_FLIGHT) * cores)
    if launch.kernel.startswith(MATRIX_KERNELS) and rows > 1:
        busy = min(1.0, held / FULL_OF_MATRICES) * cores
        fma = 512.0 if machine.tensors and "_coop" in launch.kernel else 102.4
        return max(memory, cost.flops / (2 * fma * machine.cycles * bound.matrices * busy)) + bound.dispatch
    busy = min(1.0, held / FULL) * cores
    return max(memory, cost.flops / 2 * _slots(d) / (LANES * machine.cycles * busy)) + bound.dispatch


def _slots(d: Dispatch) -> float:
    """Return the slots of a number that meets a row: of the dearest of its matrices, or of keys and values."""
    types = [weight.type.name for weight in d.launch.op.weights if len(weight.shape) > 1] or ["f16"]
    return max(SLOTS.get(name, SLOTS["q4_k"]) for name in types)


def step(machine: Machine, costs: list[tuple[Dispatch, Cost]], of: Mapping[str, Resources], rows: int) -> list[float]:
    """Project the longest and the shortest time of a step, in seconds."""
    return [
        sum(seconds(machine, d, cost, of.get(d.launch.kernel, FULL_CORE), bound, rows) for d, cost in costs)
        for bound in (WORST, BEST)
    ]


def plans(path: Path, tensors: bool, n_ctx: int = 4096) -> Iterator[tuple[Plan, list[tuple[Dispatch, Cost]]]]:
    """Plan a token and a prompt of PROMPT tokens as a Mac would; yield each plan and the costs of its dispatches."""
    core, device = backend.open_device("cpu", 1)
    target = Target.of(core, {**device.info, "backend": "metal"})
    with gguf.open(path) as file:
        planner = Planner(file, replace(target, cooperative=tensors), n_ctx, "f16")
        for shape in (ONE_ROW, chunk_shape(PROMPT, 0, 1, "argmax")):
            plan = planner.plan(shape, planner.max_positions[0])
            counted = Costs(plan, planner.config, planner.addresses.room.pages * planner.target.page, 0)
            yield plan, [(d, counted.of(d)) for d in plan.dispatches]


def compiled(kernels: set[str]) -> dict[str, Resources]:
    """Read registers and threadgroup memory of these kernels out of their LLVM IR."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from support.msl_front.occupancy import resources

    return {name: Resources(*found) for name, found in resources(kernels).items()}


def rows_of(path: Path, with_compiled: bool) -> Iterator[tuple[str, str, str, str]]:
    """Yield (machine, decode, prompt, published) for each machine, as text."""
    made = {tensors: list(plans(path, tensors)) for tensors in (False, True)}
    kernels = {d.launch.kernel for of in made.values() for plan, _ in of for d in plan.dispatches}
    of = compiled(kernels) if with_compiled else {}
    with gguf.open(path) as file:
        known = PUBLISHED.get(str(file.metadata.get("general.architecture")), {})
    for machine in MACHINES:
        (_, one), (_, many) = made[machine.tensors]
        decode = [1 / t for t in step(machine, one, of, 1)]
        prompt = [PROMPT / t for t in step(machine, many, of, PROMPT)]
        yield machine.name, _range(decode), _range(prompt), known.get(machine.name, "")


def _range(values: list[float]) -> str:
    return " - ".join(f"{value:,.0f}" for value in values)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("file", type=Path, metavar="FILE.gguf")
    parser.add_argument("--compiled", action="store_true", help="registers and threadgroup memory out of LLVM IR")
    args = parser.parse_args()
    print(f"Projections, not measurements: tokens/s of {args.file.name}, f16 K/V, from an empty context.\n")
    print(f"| machine | decode (projection) | prompt of {PROMPT} (projection) | published by others |\n{'| --- ' * 4}|")
    for row in rows_of(args.file, args.compiled):
        print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
