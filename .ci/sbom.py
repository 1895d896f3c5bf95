"""Writes a software bill of materials: ``python .ci/sbom.py FILE``, in CycloneDX's JSON, from what is installed.

It has the package, all that its extras for users bring at run time, and the libraries in the chat page. Two runs with
the same packages write the same bytes. ``--requirements`` prints the packages with their versions instead, for
pip-audit.
"""

from __future__ import annotations

import json
import re
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
VENDOR = ROOT / "python" / "zincmetal" / "serve" / "static" / "vendor" / "vendor.json"
EXTRAS = ("", "server", "hub", "grammar")  # what users install; "" is the package alone
_REQUIREMENT = re.compile(r"(?P<name>[A-Za-z0-9._-]+)(?:\[(?P<extras>[^]]*)\])?(?P<rest>[^;]*)(?:;(?P<marker>.*))?")
#: Licences by the classifiers of packages that name no SPDX expression.
_CLASSIFIERS = {
    "MIT License": "MIT",
    "BSD License": "BSD-3-Clause",
    "Apache Software License": "Apache-2.0",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
    "Python Software Foundation License": "PSF-2.0",
}
_NAMES = {"Apache License, Version 2.0": "Apache-2.0", "Apache 2.0": "Apache-2.0", "Apache": "Apache-2.0"}


def normal(name: str) -> str:
    """Returns the name of a package as indexes spell it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def applies(marker: str | None, extra: str) -> bool:
    """Tells if a requirement holds here, for an extra. pip's own parser of markers decides."""
    from pip._vendor.packaging.markers import Marker

    return marker is None or Marker(marker).evaluate({"extra": extra})


def installed(package: str = "zincmetal") -> dict[str, metadata.Distribution]:
    """Finds the package's distribution and all that it needs at run time, by name, in the order of names."""
    found: dict[str, metadata.Distribution] = {}
    wanted = [(package, extra) for extra in EXTRAS]
    seen = set(wanted)
    while wanted:
        name, extra = wanted.pop()
        held = found[normal(name)] = metadata.distribution(name)
        for line in held.requires or ():
            match = _REQUIREMENT.match(line)
            assert match, line
            if not applies(match["marker"], extra):
                continue
            more = [e.strip() for e in (match["extras"] or "").split(",") if e.strip()]
            for one in [(match["name"], e) for e in ("", *more)]:
                if one not in seen:
                    seen.add(one)
                    wanted.append(one)
    return dict(sorted(found.items()))


def licence(held: metadata.Distribution) -> str:
    """Reads the licence of a package: an SPDX expression, or "" if it names none that is known."""
    if expression := held.metadata.get("License-Expression"):
        return expression
    for line in held.metadata.get_all("Classifier") or ():
        if line.startswith("License ::") and (known := _CLASSIFIERS.get(line.split(" :: ")[-1])):
            return known
    named = (held.metadata.get("License") or "").strip()
    return _NAMES.get(named, named if re.fullmatch(r"[A-Za-z0-9.+ ()-]{1,60}", named) else "")


def vendored() -> list[dict[str, Any]]:
    """Lists the libraries of the chat page."""
    table: dict[str, Any] = json.loads(VENDOR.read_text())
    return [
        {
            "type": "library",
            "name": name,
            "version": entry["version"],
            "purl": f"pkg:npm/{name.replace('@', '%40')}@{entry['version']}",
            "licenses": [{"expression": entry["licence"]}],
            "components": [
                {"type": "file", "name": file, "hashes": [{"alg": "SHA-256", "content": facts["sha256"]}]}
                for file, facts in sorted(entry["files"].items())
            ],
        }
        for name, entry in sorted(table.items())
    ]


def bill() -> dict[str, Any]:
    """Makes the bill of materials."""
    found = installed()
    root = found.pop("zincmetal")
    packages = [
        {
            "type": "library",
            "name": name,
            "version": held.version,
            "purl": f"pkg:pypi/{name}@{held.version}",
            "licenses": [{"expression": spdx}] if (spdx := licence(held)) else [],
        }
        for name, held in found.items()
    ]
    own = {"type": "application", "name": "zincmetal", "version": root.version, "licenses": [{"expression": "MIT"}]}
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": own},
        "components": packages + vendored(),
    }


def main(argument: str) -> None:
    """Prints requirements, or writes the file."""
    if argument == "--requirements":
        print(*(f"{n}=={held.version}" for n, held in installed().items() if n != "zincmetal"), sep="\n")
        return
    Path(argument).parent.mkdir(parents=True, exist_ok=True)
    Path(argument).write_text(json.dumps(bill(), indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
