"""Downloads a model into zincmetal's own folder, and removes one from it.

A file has its final name only when it is whole: its bytes go to a hidden file beside, whose checksum is compared with
the hub's, and which is then renamed. An unfinished file stays, and the next download goes on with it.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from .. import settings
from ..errors import DownloadError, GGUFError, ModelNotFoundError, UsageError, did_you_mean, quote
from ..plan.estimate import in_units
from . import catalogue
from .lookup import matching
from .names import Name, parse, rank, same_quant
from .remote import Hub, RemoteFile, RemoteModel
from .stores import OWN, local_models

PARTIAL = ".partial"  # the folder of unfinished files, in that of all models
SPARE = 256 << 20  # bytes that a download leaves free on the disk
BLOCK = 1 << 20

HEADER = 32 << 20  # bytes that have the header of a model: the longest in use have about 15 MB

Progress = Callable[[int, int], None]
Judge = Callable[[Path], None]


def choose(text: str) -> tuple[str, str]:
    """Return the repository and the quant type ("" for any) that a name stands for, without asking the network.

    Raises ModelNotFoundError for a name that the catalogue does not have, UsageError for text that is no name.
    """
    name = parse(text)
    if name is None:
        raise UsageError(
            f"{quote(text)} is no name of a model; a name is owner/repo, owner/repo:quant, or a short name"
        )
    entry = catalogue.find(name)
    if name.owner:
        usual = entry.quants[0] if entry and not name.tag else name.tag
        return f"{name.owner}/{name.repo}", usual
    if entry is None:
        hint = did_you_mean(text, [e.name for e in catalogue.ENTRIES])
        raise ModelNotFoundError(f"the catalogue has no model {quote(text)}{hint}; name it as owner/repo:quant")
    return entry.repo, name.tag or entry.quants[0]


def find_remote(text: str, hub: Hub | None = None) -> RemoteModel:
    """Ask the hub for the files of a name. Raises DownloadError, and as :func:`choose`.

    A quant type that the user did not name is taken to the letter: the dynamic files of another type may not run.
    """
    repo, tag = choose(text)
    found = (hub or Hub()).models(repo)
    found.sort(key=lambda m: rank(m.quant))
    exact = [m for m in found if m.quant.upper() == tag.upper()] if tag else found
    alike = [m for m in found if same_quant(tag, m.quant)] if ":" in text else []
    if not (exact or alike):
        there = ", ".join(dict.fromkeys(m.quant or m.files[0].name for m in found)) or "no GGUF file"
        raise DownloadError(f"{repo} has no files of type {tag or 'GGUF'}; it has {there}")
    return (exact or alike)[0]


def pull(text: str, progress: Progress = lambda done, total: None, judge: Judge | None = None) -> Path:
    """Download a model by its name, and return the path of its first file. ``progress(done, total)`` counts bytes.

    Files that are here already are kept. When the header of a file has arrived, ``judge`` gets a stand-in with that
    header and no data, and may raise: the rest is not downloaded then. A split model has no such stand-in.
    Raises DownloadError, ModelNotFoundError, UsageError, and what ``judge`` raises.
    """
    hub = Hub()
    model = find_remote(text, hub)
    folder = settings.models_folder() / model.repo
    wanted = [f for f in model.files if not _is_here(folder / f.name, f)]
    with _words_for_disk(folder):
        _make_folder(folder)
        _make_folder(settings.models_folder() / PARTIAL)
        _check_space(folder, model, wanted)
        done = model.nbytes - sum(f.nbytes for f in wanted)
        for file in wanted:
            first = judge if len(model.files) == 1 else None
            _fetch(hub, model, file, lambda n, before=done: progress(before + n, model.nbytes), first)  # type: ignore[misc]
            done += file.nbytes
        for file in wanted:  # all are whole: only now the model appears
            _publish(model, file, folder / file.name)
    progress(model.nbytes, model.nbytes)
    return folder / model.files[0].name


def _fetch(
    hub: Hub, model: RemoteModel, file: RemoteFile, progress: Callable[[int], None], judge: Judge | None
) -> None:
    """Bring the unfinished file of ``file`` to its end, and compare its checksum."""
    with unfinished(model, file) as out:
        digest = _digest_of(out, file)
        offset = out.tell()
        progress(offset)
        for chunk in hub.read(model, file, offset) if offset < file.nbytes else ():
            if chunk is None:
                out.seek(0)
                out.truncate()
                digest = hashlib.sha256()
            else:
                out.write(chunk)
                digest.update(chunk)
            progress(out.tell())
            if judge and out.tell() >= min(HEADER, file.nbytes):
                _judge_header(out, file, unfinished_path(model, file), judge)
                judge = None
        out.flush()
        os.fsync(out.fileno())
        if digest.hexdigest() != file.sha256:
            out.truncate(0)
            raise DownloadError(
                f"{file.name}: the checksum of what has arrived is not the hub's; it has been deleted: try again"
            )


def _judge_header(out: BinaryIO, file: RemoteFile, path: Path, judge: Judge) -> None:
    """Show ``judge`` a file of the right length, with the first bytes of the model and without the others."""
    stand_in = path.with_name(f"{path.name}.header")
    end = out.tell()
    out.seek(0)
    try:
        stand_in.write_bytes(out.read(HEADER))
        os.truncate(stand_in, file.nbytes)  # the rest takes no space
        judge(stand_in)
    except GGUFError:
        pass  # the header is longer, or the file is bad: the load will say it
    finally:
        stand_in.unlink(missing_ok=True)
        out.seek(end)


def _digest_of(out: BinaryIO, file: RemoteFile) -> Any:
    """Return the checksum of what an unfinished file has, and go to its end. One that is too long begins again."""
    digest = hashlib.sha256()
    if os.fstat(out.fileno()).st_size > file.nbytes:
        out.truncate(0)
    out.seek(0)
    while block := out.read(BLOCK):
        digest.update(block)
    return digest


@contextmanager
def unfinished(model: RemoteModel, file: RemoteFile) -> Iterator[BinaryIO]:
    """Open the unfinished file of ``file``, for this process alone."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    with os.fdopen(os.open(unfinished_path(model, file), flags, 0o644), "r+b") as out:
        try:
            fcntl.flock(out, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DownloadError(f"{file.name}: another process downloads it: wait for that one") from None
        yield out


def unfinished_path(model: RemoteModel, file: RemoteFile) -> Path:
    """Return the path of an unfinished file. Its name has the checksum: another version of the file begins anew."""
    return settings.models_folder() / PARTIAL / f"{_label(model.repo)}{file.name}.{file.sha256[:16]}"


def _label(repo: str) -> str:
    return repo.lower().replace("/", "--") + "--"


def _publish(model: RemoteModel, file: RemoteFile, path: Path) -> None:
    """Give a whole file its name, at once. Its checksum is noted beside it."""
    note = _note(path)
    note.write_text(f"{file.sha256} {file.nbytes}\n")
    os.replace(unfinished_path(model, file), path)


def _note(path: Path) -> Path:
    return path.with_name(f".{path.name}.sha256")


def _is_here(path: Path, file: RemoteFile) -> bool:
    """Return True if a file is here with the checksum of the hub's, as it was noted when it arrived."""
    try:
        return path.stat().st_size == file.nbytes and _note(path).read_text().split()[0] == file.sha256
    except (OSError, ValueError, IndexError):
        return False


def _make_folder(folder: Path) -> None:
    """Make a folder below that of all models. A link in its place is refused: files would land elsewhere."""
    folder.mkdir(parents=True, exist_ok=True)
    root = os.path.realpath(settings.models_folder())
    if os.path.commonpath([os.path.realpath(folder), root]) != root:
        raise DownloadError(f"{folder} leads out of {root}: remove that link")


def _check_space(folder: Path, model: RemoteModel, wanted: list[RemoteFile]) -> None:
    """Raise DownloadError if the disk has no room for what is still to come."""
    here = sum(_size(unfinished_path(model, f)) for f in wanted)
    needed, free = sum(f.nbytes for f in wanted) - here, shutil.disk_usage(folder).free
    if wanted and needed + SPARE > free:
        raise DownloadError(
            f"{model.repo}: {in_units(needed)} are to come, and the disk of {folder} has {in_units(free)} free; make "
            f"room, or set {settings.MODELS.name} to a folder of another disk"
        )


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


@contextmanager
def _words_for_disk(folder: Path) -> Iterator[None]:
    """Turn errors of the disk into DownloadError. What has arrived stays."""
    try:
        yield
    except DownloadError:
        raise
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "make room and try again: what has arrived stays" if full else f"set {settings.MODELS.name} to another"
        raise DownloadError(f"{folder} cannot be written: {error.strerror or error}; {remedy}") from error


# ---- removing ---------------------------------------------------------------------------------------------------


def removable(text: str) -> list[Path]:
    """List the files that a removal of this name deletes: of zincmetal's own folder, unfinished ones too.

    Raises ModelNotFoundError if there are none, UsageError if they are another program's.
    """
    name = parse(text)
    if name is None:
        raise UsageError(f"{quote(text)} is no name of a model")
    there = local_models()
    found = matching(name, there)
    own = [m for m in found if m.store == OWN]
    files = [path for m in own for path in m.parts] + _unfinished_of(name)
    if files:
        return files
    if found:
        raise UsageError(f"{found[0].name} belongs to {found[0].store}, in {found[0].path.parent}: remove it there")
    hint = did_you_mean(text, [m.name for m in there if m.store == OWN])
    raise ModelNotFoundError(f"{quote(text)} is no model in {settings.models_folder()}{hint}")


def _unfinished_of(name: Name) -> list[Path]:
    """List the unfinished files of a repository."""
    entry = catalogue.find(name)
    repo = entry.repo if entry else str(Name(name.owner, name.repo, ""))
    found = unfinished_files()
    return [p for p in found if p.name.startswith(_label(repo)) and name.tag.lower() in p.name.lower()]


def unfinished_files() -> list[Path]:
    """List what has arrived of downloads that did not end."""
    try:
        return sorted(p for p in (settings.models_folder() / PARTIAL).iterdir() if p.name.isprintable())
    except OSError:
        return []


def remove(files: list[Path]) -> int:
    """Delete files, their notes, and folders that are then empty. Returns the bytes that were freed."""
    freed = 0
    for path in files:
        freed += _size(path)
        path.unlink(missing_ok=True)
        _note(path).unlink(missing_ok=True)
        for folder in path.parents[:2]:
            if folder == settings.models_folder():
                break
            with suppress(OSError):  # others are in it
                folder.rmdir()
    return freed
