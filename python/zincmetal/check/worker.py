"""Process in which checks run. It reads a request from standard input and writes one JSON object on each line.

- ``{"plan": names}`` when the device is open;
- for every check ``{"begin": name}``, then an object with its name, status, message and figures;
- ``{"end": true}`` after the last check;
- ``{"again": true}`` if the device is lost and a new process must continue.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from ..device import backend
from ..errors import DeviceError
from ..plan.estimate import in_units
from . import running, timing
from .cases import OF_NORM, Case, cases, has_cooperative, reference_case, scenes
from .compare import Mismatch, largest_difference
from .dispatches import decode_step
from .mapped import mapped
from .results import FAIL, PASS, WARN, Outcome

if TYPE_CHECKING:
    from .. import _core

SIMDGROUP, THREADGROUP_BYTES = 32, 32768  # the kernels need a simdgroup of exactly, threadgroup memory of at least

Check: TypeAlias = Callable[[], Outcome]
Event: TypeAlias = dict[str, Any]


def main() -> None:
    """Run the checks of a request: {"device", "file", "only", "long", "soak", "capture", "done"}."""
    logging.getLogger("zincmetal").addHandler(logging.StreamHandler())  # the runner makes a WARN of a warning
    logging.getLogger("zincmetal.device").setLevel(logging.ERROR)  # it warns of replaced kernels; the results name them
    request = json.load(sys.stdin)
    for event in events(request):
        print(json.dumps(event), flush=True)


def events(request: Mapping[str, Any]) -> Iterator[Event]:
    """Run the checks; yield the objects that the worker writes."""
    yield {"begin": "device"}
    try:
        lab = Lab(request["device"])
    except Exception as error:
        yield _event("device", Outcome(FAIL, _message(error)))
        yield {"end": True}
        return
    planned = {name: check for name, check in lab.checks(request) if _wanted(name, request["only"])}
    yield {"plan": ["device", *planned]}
    yield _event("device", lab.about())
    for name, check in planned.items():
        if name in request["done"]:
            continue
        yield {"begin": name}
        try:
            outcome, failed = check(), False
        except Mismatch as error:
            outcome, failed = Outcome(FAIL, str(error)), False
        except Exception as error:
            outcome, failed = Outcome(FAIL, _message(error)), isinstance(error, DeviceError)
        yield _event(name, outcome)
        if failed:  # with some drivers the device is then lost for the whole process
            yield {"again": True}
            return
    yield {"end": True}


class Lab:
    """Device under test, the CPU with the Metal text as the reference, and the checks.

    Raises UsageError or DeviceError if one of them does not open.
    """

    def __init__(self, device: str | None) -> None:
        self.name = backend.choose(device)
        self.core = backend.load(self.name)
        began = time.perf_counter()
        self.device: _core.Device = self.core.Device(kernel_folder=backend.kernel_folder(self.core))
        self._opened = time.perf_counter() - began
        cpu, kind = backend.load("cpu"), self.device.info["backend"]
        self.reference: _core.Device = cpu.Device(native=False)
        self._kernels = set(self.device.kernel_names())
        cooperative = has_cooperative(self._kernels)
        self.cases = cases(self.core, kind, cooperative)
        self._reference_scenes = scenes(cpu, kind, self.core, cooperative)

    def about(self) -> Outcome:
        """Describe the device; fail or warn if it is too small or too old for the kernels."""
        info = self.device.info
        features = info["features"]
        family = f", {features['family']}" if "family" in features else ""
        memory, largest = in_units(info["working_set_bytes"]), in_units(info["max_buffer_bytes"])
        message = f"{info['name']} ({info['backend']}){family}; memory {memory}, buffers of up to {largest}"
        if "kernels" in features:
            message += f"; {features['kernels']}"
        message += f"; opened in {self._opened:.2f} s"
        if info["backend"] == "cpu":
            message += f"; its native kernels ({features['native kernels']}) are compared with the Metal text"
        figures = {**info, "seconds_to_open": self._opened}
        if info["max_threadgroup_bytes"] < THREADGROUP_BYTES:
            return Outcome(FAIL, f"{message}; threadgroups have less memory than the 32 KiB that kernels need", figures)
        if "older" in family:
            return Outcome(WARN, f"{message}; the kernels need Apple7, which is M1", figures)
        return Outcome(PASS, message, figures)

    def checks(self, request: Mapping[str, Any]) -> Iterator[tuple[str, Check]]:
        """Yield every check by name, in the order of the run."""
        for feature, message in self.device.info["features"].items():
            if feature.startswith("warnings "):  # of a source that compiles
                yield f"source/{feature.removeprefix('warnings ')}", partial(Outcome, WARN, message)
            elif feature.endswith(".metal"):  # a source that does not
                yield f"source/{feature}", partial(Outcome, FAIL, message)
        # A kernel that the CPU has and this device lacks counts only if plans for this device want it.
        names = sorted({*self._kernels, *(self.cases.keys() & {*self.reference.kernel_names()})})
        for name in names:
            yield f"pipeline/{name}", partial(self._pipeline, name)
        for name in names:
            yield f"kernel/{name}", partial(self._kernel, name)
        yield "map/weights", partial(mapped, self.core, self.device)
        file = request["file"]
        yield "model/first tokens", partial(self._model, file)
        if file is not None:
            yield from running.checks(Path(file), self.name, request["long"], request["soak"])
        if file is not None and request["capture"]:
            yield "capture", partial(running.captured, Path(file), self.name, request["capture"])
        if file is not None:
            yield "timing/decode step", partial(decode_step, Path(file), self.name)
        for shape in timing.shapes():
            yield f"timing/{shape.name}", partial(timing.measure, self.core, self.device, shape)

    def _pipeline(self, name: str) -> Outcome:
        """Build a kernel; check that it takes as many threads as plans launch."""
        if name not in self._kernels:
            return Outcome(FAIL, f"{self.name} has no such kernel{self._replaced(name)}")
        began = time.perf_counter()
        try:
            threads, width, nbytes = self.device.limits(name)
        except DeviceError as error:
            return Outcome(FAIL, _message(error) + self._replaced(name))
        seconds = time.perf_counter() - began
        figures = {"max_threads": threads, "simd_width": width, "threadgroup_bytes": nbytes, "seconds": seconds}
        case = self.cases.get(name)
        if width != SIMDGROUP:
            return Outcome(FAIL, f"its simdgroups have {width} threads; the kernels need {SIMDGROUP}", figures)
        if nbytes > (has := self.device.info["max_threadgroup_bytes"]):
            return Outcome(FAIL, f"it uses {nbytes} bytes of threadgroup memory; the device has {has}", figures)
        if case and case.launch.threads > threads:
            message = f"it takes {threads} threads; plans launch {case.launch.threads}{self._replaced(name)}"
            return Outcome(FAIL, message, figures)
        return Outcome(PASS, f"up to {threads} threads", figures)

    def _replaced(self, name: str) -> str:
        """Name the kernels that plans use if a kernel is missing; empty if there are none."""
        replacements = self.cases[name].replacements if name in self.cases else []
        return f"\nthe engine uses {', '.join(replacements)} instead" if replacements else ""

    def _kernel(self, name: str) -> Outcome:
        """Compare a kernel's results on the device with those on the CPU."""
        if name not in self.cases:
            return Outcome(FAIL, "not run: check has no case for this kernel")
        pipeline = self._pipeline(name)
        if pipeline.status == FAIL:
            return Outcome(FAIL, f"not run: {pipeline.message.partition(chr(10))[0]}")
        share = max(self._difference(case) for case in (self.cases.get(name), self.cases.get(name + OF_NORM)) if case)
        return Outcome(PASS, f"{share:.2f} of the allowed error", {"error": share})

    def _difference(self, case: Case) -> float:
        reference = reference_case(case, self._reference_scenes)
        return largest_difference(self.core, case, self.device, reference, self.reference)

    def _model(self, file: str | None) -> Outcome:
        """Compare a model's first tokens with those on the CPU."""
        from ..hub import GET_DEMO
        from .tokens import first_tokens

        if file is None:
            return Outcome(WARN, f"not run: no model; pass a GGUF file, or {GET_DEMO} for a small one")
        return first_tokens(Path(file), self.name)


def _event(name: str, outcome: Outcome) -> Event:
    sys.stderr.flush()
    return {
        "name": name,
        "status": outcome.status,
        "message": outcome.message,
        "figures": dict(outcome.figures),
        "printed": os.fstat(2).st_size,  # standard error is a file of the runner
    }


def _wanted(name: str, patterns: list[str]) -> bool:
    """Return True if a check is asked for. A source that does not compile is always reported."""
    return not patterns or name.startswith("source/") or any(fnmatch(name, pattern) for pattern in patterns)


def _message(error: Exception) -> str:
    """Write an error with its type, each line once."""
    return f"{type(error).__name__}: " + "\n".join(dict.fromkeys(str(error).splitlines()))


if __name__ == "__main__":
    main()
