"""Running model: its engine, scheduler, prefix cache and step thread. Models and their forks share one."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

from .. import settings
from .block_drafts import BlockDrafter
from .cache_folder import CacheFolder
from .cache_keys import fingerprint
from .cache_tier import Tier, Transfer
from .draft_model import DraftModel
from .engine import Engine
from .prefix_cache import PrefixCache
from .scheduler import QUEUE_LIMIT, Scheduler
from .step_loop import StepLoop


class Running:
    """Engine with its scheduler. The last user to go gives the memory back."""

    def __init__(
        self,
        engine: Engine,
        with_cache: bool = True,
        cache_dir: Path | str | None = None,
        queue_limit: int = QUEUE_LIMIT,
    ) -> None:
        self.engine = engine
        self.cache = PrefixCache(engine.pages, engine.slots, engine.page, engine.recurrent) if with_cache else None
        self._cache_dir = cache_dir
        self._tiers = list[Tier]()  # the last one counts; earlier ones have pages of another layout
        self.scheduler = Scheduler(
            engine,
            self.cache,
            tier=self._new_tier(),
            pages=engine.pages,
            slots=engine.slots,
            seats=engine.free_seats,
            queue_limit=queue_limit,
            not_finite=lambda sequence: engine.not_finite(sequence.pages),
        )
        self._draft_models: dict[Path, DraftModel] = {}
        self.loop = StepLoop(self.scheduler, at_end=partial(_end, engine, self._tiers, self._draft_models))
        # Without a lock, which an interrupt or a finalizer could find held: single calls of a dict are atomic.
        self._users: dict[object, None] = {}

    def use(self) -> Callable[[], None]:
        """Count a user. The result, called once, takes it back, and closes everything after the last."""
        user = object()
        self._users[user] = None
        self.engine.check_usable()  # the last user may have gone at this moment

        def leave() -> None:
            del self._users[user]
            if not self._users:
                self.close()

        return leave

    def draft_model(self, path: Path) -> DraftModel:
        """Return the draft model of a file, loaded at first use. Raises what loading raises, and UsageError."""
        self.loop.refuse_own_thread()
        found = self._draft_models.get(path)
        if found is None:
            made = DraftModel(path, self.engine)
            found = self._draft_models.setdefault(path, made)
            if found is not made:  # another thread was quicker
                made.free()
        if self.loop.closed:  # perhaps its end knew nothing of this one
            self.loop.close()
            _free(self._draft_models)
            self.loop.check_usable()
        return found

    def block_drafter(self) -> BlockDrafter:
        """Return a drafter by the model's own block, loaded at first use. Raises UsageError, OutOfMemoryError."""
        if not self.engine.config.drafts:
            self.loop.call(self._load_block)
        return BlockDrafter()

    def _load_block(self) -> None:
        """Load the block that drafts, between two steps. All that was cached or moved out lacks its contents."""
        if not self.engine.config.drafts:
            self.engine.load_block()
            self.scheduler.pools.forget_copies(self._new_tier())

    @property
    def tier(self) -> Tier | None:
        """Lower tier of the cache, if there is one."""
        return self._tiers[-1] if self._tiers else None

    def _new_tier(self) -> Transfer | None:
        """Make the lower tier of the cache for the pages of now."""
        engine = self.engine
        tier = _tier(engine, self._cache_dir) if self.cache else None
        if self.cache is None or tier is None:
            return None
        self._tiers.append(tier)
        return Transfer(engine, self.cache, tier, engine.page_bytes, engine.slot_bytes)

    def close(self) -> None:
        """End all requests. The device memory and the file are given back when no step runs any more.

        This waits for it, except on the step thread or within a session, where it could not end.
        """
        self.engine.refuse()
        self.loop.close()


def _tier(engine: Engine, folder: Path | str | None) -> Tier | None:
    """Make the lower tier of the cache: of a folder, and where the device has memory of its own."""
    info, host = engine.device.info, settings.host_cache()
    if folder is None and (info["unified_memory"] or not host):
        return None
    facts = engine.loaded.kv, engine.page, engine.page_bytes, engine.slot_bytes, info["backend"]
    turns = list(engine.config.rope_tables.values())  # some files have others for a longer context
    model = fingerprint(engine.file, *facts, turns)
    files = None if folder is None else CacheFolder(Path(folder), model, settings.disk_cache())
    return Tier(model, host, files)


def _end(engine: Engine, tiers: list[Tier], draft_models: dict[Path, DraftModel]) -> None:
    """Give back what a running model has, when no step runs any more."""
    _free(draft_models)
    engine.free()  # first: a disk may take its time
    for tier in tiers:
        tier.close()


def _free(draft_models: dict[Path, DraftModel]) -> None:
    """Give back what draft models have. Several threads may do so at once."""
    while draft_models:
        with suppress(KeyError):  # another one took the last
            draft_models.popitem()[1].free()
