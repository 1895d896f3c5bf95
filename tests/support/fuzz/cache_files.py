"""Any files in the folder of the prefix cache: they are misses, and tokens are those of a model without a cache.

Files are good ones with wounds, files of another kind, and files with a right checksum and a wrong size. Whoever can
write a right checksum over other keys and values is the owner of the folder, and is trusted.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from functools import cache
from hashlib import blake2b
from pathlib import Path

from support.fake_executor import VOCAB, FakeExecutor
from support.fuzz.memory import FOLDER
from support.fuzz.reading import Reading
from support.scheduler_lab import Recorded
from zincmetal.engine.cache_folder import HEADER, MAGIC, CacheFolder
from zincmetal.engine.cache_keys import DIGEST_BYTES, FORMAT
from zincmetal.engine.cache_tier import Tier, Transfer
from zincmetal.engine.pages import PagePool, StateSlots
from zincmetal.engine.prefix_cache import PrefixCache
from zincmetal.engine.request import Request
from zincmetal.engine.scheduler import Scheduler

MODEL = bytes(range(DIGEST_BYTES))
IDS = [(7 * i) % VOCAB for i in range(200)]
PAGE_BYTES = PagePool.PAGE * 2 * 8  # of the executor
BUDGET = 1 << 24


def _ask(folder: Path, ids: list[int], recurrent: bool) -> list[int]:
    """Run one prompt with a cache in this folder."""
    executor = FakeExecutor(recurrent=recurrent)
    pages, slots = PagePool(executor.pages_now), StateSlots(executor.slots_now)
    held = PrefixCache(pages, slots, PagePool.PAGE, recurrent)
    tier = Tier(MODEL, BUDGET, CacheFolder(folder, MODEL, BUDGET))
    transfer = Transfer(executor, held, tier, PAGE_BYTES)
    scheduler = Scheduler(executor, held, tier=transfer, pages=pages, slots=slots, clock=lambda: executor.now)
    sink = Recorded(executor)
    scheduler.submit(Request(ids, 3, sink))
    message = None
    while scheduler.step(message):
        message = scheduler.rest()
    tier.close()
    assert sink.error is None, sink.error
    return sink.tokens


@cache
def _written(recurrent: bool) -> tuple[dict[str, bytes], list[int]]:
    """Files that one prompt leaves, and its tokens."""
    with tempfile.TemporaryDirectory() as folder:
        tokens = _ask(Path(folder), list(IDS), recurrent)
        return {p.name: p.read_bytes() for p in sorted((Path(folder) / MODEL.hex()).iterdir())}, tokens


def _digest(data: bytes) -> bytes:
    return blake2b(data, digest_size=DIGEST_BYTES).digest()


def _wounded(data: Reading, name: str, whole: bytes) -> bytes:
    """A file with a wound, or another."""
    kind = data.byte() % 4
    if kind == 0:
        return whole[: data.number(2)]
    if kind == 1:
        at = data.number(2) % len(whole)
        return whole[:at] + bytes([whole[at] ^ (data.byte() or 1)]) + whole[at + 1 :]
    if kind == 2:
        return data.take(data.byte())
    held = data.take(data.byte())
    return HEADER.pack(MAGIC, FORMAT, len(held), MODEL, _digest(name.encode()), _digest(held)) + held


def run(data: bytes) -> None:
    """Wound some files of a folder, and ask with it."""
    given = Reading(data)
    recurrent = bool(given.byte() & 1)
    files, tokens = _written(recurrent)
    root = Path(tempfile.mkdtemp(prefix="zincmetal-fuzz-", dir=FOLDER))
    folder = root / MODEL.hex()
    try:
        folder.mkdir()
        for name, whole in files.items():
            held = _wounded(given, name, whole) if given.byte() & 1 and name.endswith(".page") else whole
            if held is not whole and given.byte() % 8 == 7:
                name = os.fsdecode(given.take(20).replace(b"/", b"").replace(b"\0", b"") or b"x") + ".state"
            (folder / name).write_bytes(held)
        assert _ask(root, list(IDS), recurrent) == tokens
    finally:
        shutil.rmtree(root)


def seeds() -> list[bytes]:
    """Each kind of wound."""
    return [bytes([r, 1, kind, 40, 1, 0, 1, kind, 9, 9, 9, 0]) for r in (0, 1) for kind in range(4)]
