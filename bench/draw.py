"""Times the draw of a token from logits, beside the arg max, for common options of sampling.

    python bench/draw.py --device cuda --vocab 248320 --outputs 1 32

Logits are flat, as random weights make them, or peaked, as a trained model's are. ``us`` is the device time of all
kernels for one step. With ``--parts`` it also shows the time up to each kernel.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from zincmetal.check.timing import CFG
from zincmetal.device import backend
from zincmetal.device.buffers import step_record
from zincmetal.device.core import BoundDispatch
from zincmetal.graph.ops import DRAWS, HISTORY, LOGITS, PAGES, STEP, Op, Operand, Value
from zincmetal.measure.tables import table
from zincmetal.plan.addresses import Room, pages_of, state_sizes
from zincmetal.plan.chunks import decode_shape
from zincmetal.plan.launch import Launch
from zincmetal.plan.lower import Lowering
from zincmetal.plan.target import Target
from zincmetal.sampling.draws import draw_record, noise_key
from zincmetal.sampling.noise import NoiseSource
from zincmetal.sampling.params import SamplingParams

SETTINGS: dict[str, dict[str, Any] | None] = {
    "argmax": None,
    "min-p .05, 0.8": {"temperature": 0.8, "min_p": 0.05},
    "top-k 40, 0.8": {"temperature": 0.8, "top_k": 40},
    "0.7, top-k 20, top-p .8, presence 1.5": {
        "temperature": 0.7,
        "top_k": 20,
        "top_p": 0.8,
        "presence_penalty": 1.5,
    },
    "top-p .95": {"temperature": 1.0, "top_p": 0.95},
    "temperature 1": {"temperature": 1.0},
    "typical .95": {"temperature": 1.0, "typical_p": 0.95},
}
POSITION = 1000
COPIES, TRIES = 50, 5


class Bench:
    """The end of a plan for ``outs`` outputs, with its buffers."""

    def __init__(self, device_name: str, n_vocab: int, outs: int, threads: int = 0) -> None:
        self._core = backend.load(device_name)
        folder = backend.kernel_folder(self._core)
        self._device = self._core.Device(threads=threads, native=True, kernel_folder=folder)
        cfg = replace(CFG, n_vocab=n_vocab)
        self._target = Target.of(self._core, self._device.info)
        self._lowering = Lowering(self._target, cfg, "f16", decode_shape(outs, "draw"))
        self._outs, self._n_vocab = outs, n_vocab
        self._sizes = state_sizes(cfg, self._target, "f16", Room(pages_of(cfg, self._target), 1, 1))
        self._buffers: dict[str, Any] = {}
        self._write(STEP, step_record(self._core, outs, outs, outs))
        self._write(PAGES, np.arange(pages_of(cfg, self._target), dtype=np.uint32))
        rng = np.random.default_rng(1)
        self._write(HISTORY, rng.integers(0, n_vocab, self._sizes[HISTORY] // 4).astype(np.int32))

    def fill(self, peaked: bool) -> None:
        """Writes the logits of every output."""
        rng = np.random.default_rng(2)
        x = rng.standard_normal((self._outs, self._n_vocab)).astype(np.float32)
        if peaked:
            x *= 2
            for row in x:
                row[rng.integers(0, self._n_vocab, 20)] += 14 + 2 * rng.standard_normal(20).astype(np.float32)
        self._write(LOGITS, x)

    def launches(self, options: dict[str, Any] | None) -> list[Launch]:
        """Lowers the output, and writes its draws."""
        if options is None:
            return self._lowering.launches(Op("argmax"))
        dtype, draws = self._core.params_dtype("Draw"), []
        for i in range(self._outs):
            params = SamplingParams(**options, seed=i)
            draws.append(draw_record(dtype, params, POSITION, noise_key(NoiseSource(i), POSITION)))
        self._write(DRAWS, np.concatenate(draws))
        return self._lowering.launches(Op("draw"))

    def seconds(self, launches: list[Launch]) -> float:
        """Returns the device seconds of these launches: the best of some tries, after one to warm up."""
        dispatches = [
            BoundDispatch.of(launch, [self._bind(arg.operand) for arg in launch.args], barrier=True)
            for _ in range(COPIES)
            for launch in launches
        ]
        self._device.run(dispatches)
        return float(min(self._device.run(dispatches) for _ in range(TRIES)) / COPIES)

    def _bind(self, operand: Operand) -> tuple[Any, int, int]:
        if operand.name not in self._buffers:
            assert not isinstance(operand, Value) or operand.outs
            nbytes = 4 * operand.width * self._outs if isinstance(operand, Value) else self._sizes[operand]  # type: ignore[index]
            self._write(operand, np.zeros(nbytes, np.uint8))
        buffer = self._buffers[operand.name]
        return buffer, 0, buffer.nbytes

    def _write(self, operand: Operand, content: Any) -> None:
        if operand.name not in self._buffers or self._buffers[operand.name].nbytes < content.nbytes:
            self._buffers[operand.name] = self._device.alloc(content.nbytes)
        self._buffers[operand.name].write(np.ascontiguousarray(content).view(np.uint8).ravel())


def rows(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Measures every setting."""
    for outs in args.outputs:
        bench = Bench(args.device, args.vocab, outs, args.threads)
        for peaked in (False, True):
            bench.fill(peaked)
            for name, options in SETTINGS.items():
                launches = bench.launches(options)
                row = {"outputs": outs, "logits": "peaked" if peaked else "flat", "options": name}
                row["us"] = f"{1e6 * bench.seconds(launches):.1f}"
                if args.parts:
                    up_to = (f"{1e6 * bench.seconds(launches[: i + 1]):.1f}" for i in range(len(launches)))
                    row["up to each kernel"] = " ".join(up_to)
                yield row


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "metal", "cuda"))
    parser.add_argument("--vocab", type=int, default=248320)
    parser.add_argument("--outputs", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--parts", action="store_true", help="show the time up to each kernel")
    found = list(rows(parser.parse_args()))
    print("\n".join(table(found)))


if __name__ == "__main__":
    main()
