"""Folders of model files on this machine: zincmetal's own, and those of other programs, whose files are used in place.

Nothing here writes, and nothing asks the network. What lies in these folders is hostile until it is checked: names
with control characters, links that lead out of a folder, and manifests of any content are passed over.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from .. import settings
from .demo import find_demo
from .names import is_word, part_of, quant_of, stem

OWN, HUGGING_FACE, LM_STUDIO, OLLAMA, DEMO = "zincmetal", "Hugging Face", "LM Studio", "Ollama", "demo package"
MOST_ENTRIES = 20_000  # of a folder, with all that is below it
MOST_MANIFEST = 1 << 20  # bytes
MAGIC = b"GGUF"
_DIGEST = re.compile(r"sha256[:-]([0-9a-f]{64})", re.ASCII)
_MODEL_LAYER = "application/vnd.ollama.image.model"


@dataclass(frozen=True)
class Local:
    """Model on this machine. ``parts`` are its files in order, ``missing`` the number of those that are not there.

    ``repo`` is "owner/repo", or "" if the place does not say it. ``tag`` is the quant type, or Ollama's tag.
    """

    store: str
    repo: str
    tag: str
    stem: str
    parts: tuple[Path, ...]
    nbytes: int
    missing: int = 0

    @property
    def path(self) -> Path:
        """Path that opens the whole model."""
        return self.parts[0]

    @property
    def name(self) -> str:
        """Name that finds this model."""
        return f"{self.repo}:{self.tag}" if self.repo and self.tag else self.repo or self.stem


def local_models() -> list[Local]:
    """List the models on this machine, zincmetal's own first."""
    found = list(_files(OWN, settings.models_folder()))
    found += [model for folder in _hugging_face() for model in folder]
    for folder in _lm_studio_folders():
        found += _files(LM_STUDIO, folder)
    found += _ollama()
    demo = find_demo()
    return [*found, *([Local(DEMO, "", "", "demo", (demo,), demo.stat().st_size)] if demo else [])]


def regular_inside(path: Path, root: str) -> os.stat_result | None:
    """Return the facts of a regular file that lies in ``root`` even after all links, else None."""
    try:
        real = os.path.realpath(path)
        if os.path.commonpath([real, root]) != root:
            return None
        facts = os.stat(real)
    except (OSError, ValueError):
        return None
    return facts if stat.S_ISREG(facts.st_mode) else None


# ---- files in folders -----------------------------------------------------------------------------------------


def _files(store: str, folder: Path) -> Iterator[Local]:
    """Yield the models of a folder: files in it, in ``owner/repo/``, and in folders of a repository."""
    root = os.path.realpath(folder)
    by_folder: dict[str, list[str]] = defaultdict(list)
    for parent, file_name in _walk(folder, depth=4):
        by_folder[parent].append(file_name)
    for parent, files in sorted(by_folder.items()):
        pieces = Path(parent).parts
        repo = "/".join(pieces[:2]) if len(pieces) >= 2 and all(map(is_word, pieces)) else ""
        yield from _models(store, repo, Path(folder, parent), files, root)


def _walk(folder: Path, depth: int, hidden: bool = False) -> Iterator[tuple[str, str]]:
    """Yield the GGUF files below a folder: the folder of each, relative to ``folder``, and its name.

    Links to folders are not followed. Folders whose names begin with a dot are passed over.
    """
    waiting, seen = [("", depth)], 0
    while waiting:
        relative, left = waiting.pop()
        try:
            entries = sorted(os.scandir(folder / relative), key=lambda e: e.name)
        except OSError:
            continue
        for entry in entries:
            seen += 1
            if seen > MOST_ENTRIES:
                return
            if not entry.name.isprintable() or entry.name.startswith("."):
                continue
            if entry.is_dir(follow_symlinks=False):
                if left:
                    waiting.append((os.path.join(relative, entry.name), left - 1))
            elif entry.name.lower().endswith(".gguf") and not entry.name.startswith(("mmproj", "imatrix")):
                yield relative, entry.name


def _models(store: str, repo: str, folder: Path, files: Iterable[str], root: str) -> Iterator[Local]:
    """Join the files of one folder to models: a split model is one, whether or not all its parts are there."""
    split: dict[tuple[str, int], dict[int, str]] = defaultdict(dict)
    for name in files:
        number, count = part_of(name)
        split[stem(name), count][number] = name
    for (title, count), parts in sorted(split.items()):
        facts = {n: regular_inside(folder / name, root) for n, name in sorted(parts.items()) if 1 <= n <= count}
        there = {n: f for n, f in facts.items() if f is not None}
        if there:
            paths = tuple(folder / parts[n] for n in there)
            nbytes = sum(f.st_size for f in there.values())
            yield Local(store, repo, quant_of(title) or quant_of(folder.name), title, paths, nbytes, count - len(there))


# ---- Hugging Face, LM Studio ------------------------------------------------------------------------------------


def _hugging_face() -> Iterator[Iterator[Local]]:
    """Yield the models of each repository in Hugging Face's cache: of the main revision, else of the latest one."""
    cache = settings.hugging_face_cache()
    try:
        folders = sorted(e.name for e in os.scandir(cache) if e.name.startswith("models--"))[:MOST_ENTRIES]
    except OSError:
        return
    for name in folders:
        pieces = name.split("--")
        if len(pieces) == 3 and all(map(is_word, pieces[1:])):
            yield _repository(cache / name, f"{pieces[1]}/{pieces[2]}")


def _repository(folder: Path, repo: str) -> Iterator[Local]:
    snapshots, found = folder / "snapshots", set[str]()
    for revision in _revisions(folder):
        by_folder: dict[str, list[str]] = defaultdict(list)
        for parent, file_name in _walk(snapshots / revision, depth=2):
            by_folder[parent].append(file_name)
        for parent, files in sorted(by_folder.items()):
            root = os.path.realpath(folder)  # its blobs are beside the snapshots, and links lead there
            for model in _models(HUGGING_FACE, repo, snapshots / revision / parent, files, root):
                if model.stem not in found:
                    found.add(model.stem)
                    yield model


def _revisions(folder: Path) -> list[str]:
    """List the revisions of a repository, that of ``refs/main`` first, then the latest."""
    main = _small_text(folder / "refs" / "main").strip()
    try:
        entries = [e for e in os.scandir(folder / "snapshots") if is_word(e.name) and e.is_dir(follow_symlinks=False)]
        by_age = sorted(entries, key=lambda e: -e.stat().st_mtime)
    except OSError:
        return []
    return sorted((e.name for e in by_age), key=lambda revision: revision != main)


def _lm_studio_folders() -> list[Path]:
    home = Path.home()
    return [home / ".lmstudio" / "models", home / ".cache" / "lm-studio" / "models"]


# ---- Ollama -----------------------------------------------------------------------------------------------------


def _ollama() -> Iterator[Local]:
    """Yield Ollama's models: a manifest ``registry/owner/name/tag`` names the blob that is the GGUF file."""
    folder = settings.ollama_folder()
    manifests = folder / "manifests"
    for parent, tag in _manifests(manifests):
        pieces = parent.split(os.sep)
        if len(pieces) != 3 or not all(map(is_word, [*pieces[1:], tag])):
            continue
        blob = _blob(manifests / parent / tag, folder)
        if blob is not None:
            repo = pieces[2] if pieces[1] == "library" else f"{pieces[1]}/{pieces[2]}"
            yield Local(OLLAMA, repo, tag, f"{pieces[2]}-{tag}", (blob[0],), blob[1])


def _manifests(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield the folder of each manifest, relative to ``folder``, and its name."""
    seen = 0
    for parent, folders, files in os.walk(folder):
        relative = os.path.relpath(parent, folder)
        folders[:] = sorted(f for f in folders if is_word(f)) if relative.count(os.sep) < 2 else []
        for name in sorted(files):
            seen += 1
            if seen > MOST_ENTRIES:
                return
            yield relative, name


def _blob(manifest: Path, folder: Path) -> tuple[Path, int] | None:
    """Return the GGUF file that a manifest names, and its bytes, or None."""
    root = os.path.realpath(folder)
    if regular_inside(manifest, root) is None:
        return None
    try:
        layers = json.loads(_small_text(manifest))["layers"]
        digests = [layer["digest"] for layer in layers if layer["mediaType"] == _MODEL_LAYER]
        matches = [_DIGEST.fullmatch(digest) for digest in digests]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    if len(matches) != 1 or matches[0] is None:
        return None
    path = folder / "blobs" / f"sha256-{matches[0][1]}"
    facts = regular_inside(path, root)
    return (path, facts.st_size) if facts is not None and _is_gguf(path) else None


def _is_gguf(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(4) == MAGIC
    except OSError:
        return False


def _small_text(path: Path) -> str:
    """Read a small text file, or "" if it is not one."""
    try:
        with open(path, "rb") as file:
            return file.read(MOST_MANIFEST).decode("utf-8", "replace")
    except OSError:
        return ""
