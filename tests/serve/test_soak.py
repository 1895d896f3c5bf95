"""Many requests with hang-ups, faults of the device and loads: none is wrong, none is lost, and nothing is left behind.

``make test-soak`` sends a million; ``ZINCMETAL_SOAK`` is another number.
"""

from __future__ import annotations

import asyncio
import logging
import os
from pathlib import Path

from support.soak import FAULTY, LEAVES, soak

REQUESTS = int(os.environ.get("ZINCMETAL_SOAK", "400"))
SLACK = 300  # objects: what libraries keep of their first calls


def test_soak(tmp_path: Path) -> None:
    logging.disable(logging.CRITICAL)  # pytest would keep a record of each fault
    try:
        found = asyncio.run(soak(tmp_path, REQUESTS, seed=1))
    finally:
        logging.disable(logging.NOTSET)
    outcomes = found.outcomes
    print(f"{REQUESTS} requests: {dict(outcomes)}; {found.loads} loads; {found.before} -> {found.after}")
    print(
        f"resident: {found.resident[0][1]} -> {found.resident[-1][1]} bytes; {found.bytes_per_request:.2f} per request"
    )
    assert not found.wrong[:5]
    assert outcomes["left running"] == 0
    answered = {name: outcomes[name] for name in ("right", "fault", "no room", "hung up")}
    assert sum(answered.values()) == REQUESTS
    assert outcomes["no room"] <= outcomes["refused by the server"]
    assert answered["hung up"] >= REQUESTS * LEAVES * 0.7
    assert answered["fault"] >= REQUESTS / FAULTY * 0.5
    for name in ("files", "threads", "tasks"):
        assert found.after[name] <= found.before[name], name
    assert found.after["objects"] <= found.before["objects"] + SLACK
