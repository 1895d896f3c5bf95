"""``zincmetal info``: versions, devices, supported models and limits, and the environment."""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping
from importlib import metadata
from typing import Any

from .. import settings
from ..errors import ZincError
from .arguments import Parser
from .command import Command
from .output import print_json

LIBRARIES = ("numpy", "tokenizers", "jinja2", "tqdm")


def add_arguments(p: Parser) -> None:
    """Add the options of ``info``."""
    p.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Print the facts, as a table or as JSON."""
    found = facts()
    if args.json:
        print_json(found)
    else:
        print("\n".join(_lines(found)))
    return 0


def facts() -> dict[str, Any]:
    """Collect all facts. The keys do not change from version to version."""
    from ..device import backend

    return {
        "zincmetal": version(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": {
            "type": platform.machine(),
            "model": mac_model(),
            "cpus": os.cpu_count(),
            "memory_bytes": memory_bytes(),
        },
        "libraries": {name: version(name) for name in LIBRARIES},
        "built": [name for name in (*backend.DEVICES, "checked") if backend.is_built(name)],
        "devices": {name: _device(name) for name in backend.built()},
        "families": _families(),
        "quant_types": _quant_types(),
        "limits": _limits(),
        "environment": settings.in_force(),
    }


def version(package: str = "zincmetal") -> str:
    """Return the version of a package, or "not installed"."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def memory_bytes() -> int:
    """Return the memory of the machine in bytes, or 0 if the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return 0


def mac_model() -> str:
    """Return the model of a Mac, such as "Mac15,9", or "" on another machine."""
    if sys.platform != "darwin":
        return ""
    asked = subprocess.run(["/usr/sbin/sysctl", "-n", "hw.model"], capture_output=True, text=True, check=False)
    return asked.stdout.strip()


def _device(name: str) -> dict[str, Any]:
    """Return the facts of a device, or its error under "error"."""
    from ..device import backend

    try:
        return dict(backend.open_device(name)[1].info)
    except (ZincError, ImportError, OSError) as error:
        return {"error": str(error)}


def _families() -> list[str]:
    from ..models import FAMILIES

    return sorted(FAMILIES)


def _quant_types() -> list[str]:
    from ..gguf import quants

    return [t.name for t in quants.SUPPORTED]


def _limits() -> dict[str, int]:
    """Return the largest sizes that the kernels are compiled for, or {} if no core is built."""
    from ..device import backend
    from ..plan.target import Target

    if not backend.built():
        return {}
    target = Target.of_kernels(backend.load(backend.built()[0]))
    return {
        "head_size": target.head_classes[-1],
        "head_size_multiple": target.shapes["HEAD_MULTIPLE"],
        "recurrent_head_size": target.ssm_classes[-1],
        "convolution": target.shapes["SSM_MAX_CONV"],
        "experts": target.shapes["MAX_EXPERTS"],
        "experts_used": target.shapes["MAX_EXPERTS_USED"],
        "step_tokens": target.max_rows,
    }


def _lines(found: Mapping[str, Any]) -> Iterator[str]:
    machine = found["machine"]
    model = f"{machine['model']}, " if machine["model"] else ""
    yield _row("zincmetal", found["zincmetal"])
    yield _row("Python", f"{found['python']} ({sys.executable})")
    yield _row("platform", found["platform"])
    size = f"{machine['memory_bytes'] / 2**30:.0f} GiB"
    yield _row("machine", f"{model}{machine['type']}, {machine['cpus']} CPUs, {size}")
    yield _row("libraries", ", ".join(f"{name} {v}" for name, v in found["libraries"].items()))
    yield _row("built cores", ", ".join(found["built"]) or "none")
    for name, facts in found["devices"].items():
        yield _row(f"device {name}", facts.get("error") or _device_words(facts))
    yield _row("families", ", ".join(found["families"]))
    yield _row("quant types", ", ".join(found["quant_types"]))
    yield _row("limits", ", ".join(f"{name.replace('_', ' ')} {n:,}" for name, n in found["limits"].items()))
    yield _row("environment", ", ".join(_environment(found["environment"])) or "no variable is set")


def _environment(variables: Mapping[str, str]) -> Iterator[str]:
    """Yield NAME=VALUE for each variable that is set, with a note if zincmetal set it."""
    ours = settings.RELAXED.name in variables
    for v in settings.ALL:
        if v.name in variables and not v.own:
            by = " (set by zincmetal)" if ours and v is settings.DRIVER_TIMEOUT else ""
            yield f"{v.name}={variables[v.name]}{by}"


def _device_words(facts: Mapping[str, Any]) -> str:
    features = (f"{name} {value}" for name, value in facts["features"].items())
    memory = f"{facts['working_set_bytes'] / 1e9:.1f} GB for models"
    return ", ".join([facts["name"], memory, *features])


def _row(name: str, value: str) -> str:
    return f"{name:<14} {value}"


COMMAND = Command(
    "info",
    "show versions, devices, models and limits",
    add_arguments,
    run,
    (("info", "for people"), ("info --json", "for programs, and for reports")),
    reader_gone=0,
)
