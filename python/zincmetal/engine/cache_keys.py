"""Names of what a lower tier of the prefix cache holds: by the model, and by all tokens up to a place.

A full page is named by a hash of its tokens and of the name before it. So a name stands for all tokens up to the end of
its page. States are named by the last full page before them and the tokens that follow it.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from typing import TYPE_CHECKING

import numpy as np

from .prefix_tree import Node

if TYPE_CHECKING:
    from ..gguf import File

FORMAT = 1  # of the files and of what pages and states hold
DIGEST_BYTES = 16
SAMPLED = 64  # tensors
SAMPLE_BYTES = 512  # of each

Digest = bytes


def fingerprint(file: File, *facts: object) -> Digest:
    """Hash what tells a model file from others, and facts such as the K/V type.

    Of the file these are its size, its header with all metadata, and some bytes of some tensors.
    """
    found = blake2b(repr((FORMAT, [part.size for part in file.parts], facts)).encode(), digest_size=DIGEST_BYTES)
    tensors = sorted(file.tensors.values(), key=lambda tensor: (tensor.part, tensor.offset))
    for number, part in enumerate(file.parts):
        begin = min((tensor.offset for tensor in tensors if tensor.part == number), default=part.size)
        with memoryview(part.mmap) as view:
            found.update(view[:begin])
    for tensor in tensors[:: max(1, len(tensors) // SAMPLED)]:
        middle = tensor.offset + tensor.nbytes // 2
        with memoryview(file.parts[tensor.part].mmap) as view:
            found.update(view[middle : min(middle + SAMPLE_BYTES, tensor.offset + tensor.nbytes)])
    return found.digest()


def digest_of(before: Digest, tokens: Sequence[int]) -> Digest:
    """Return the name of the tokens after what ``before`` names."""
    return blake2b(np.asarray(tokens, "<i4").tobytes(), key=before, digest_size=DIGEST_BYTES).digest()


def chain(root: Digest, ids: Sequence[int], page: int) -> list[Digest]:
    """Return the names of the first 0, 1, 2, … full pages of ``ids``."""
    data, found, n = np.asarray(ids, "<i4").tobytes(), [root], 4 * page
    for at in range(0, len(data) - n + 1, n):
        found.append(blake2b(data[at : at + n], key=found[-1], digest_size=DIGEST_BYTES).digest())
    return found


def digest_of_node(root: Digest, node: Node | None) -> Digest:
    """Return the name of a full page of the tree. Without a parent it is the root."""
    above = list[Node]()
    while node is not None and node.parent is not None and node.digest is None:
        above.append(node)
        node = node.parent
    digest = root if node is None or node.digest is None else node.digest
    for each in reversed(above):
        digest = each.digest = digest_of(digest, each.tokens)
    return digest


def page_name(digest: Digest) -> str:
    """Return the name of the keys and values of a full page."""
    return f"{digest.hex()}.page"


def state_name(digest: Digest, tail: Sequence[int]) -> str:
    """Return the name of the states some tokens after a full page."""
    return f"{digest.hex()}-{len(tail)}-{digest_of(digest, tail).hex()}.state"


def parsed_state(name: str) -> tuple[str, int] | None:
    """Return the full page (its digest, in hex) and the number of tokens after it that a name of states has."""
    pieces = name.removesuffix(".state").split("-")
    if not name.endswith(".state") or len(pieces) != 3 or not pieces[1].isdecimal():
        return None
    return pieces[0], int(pieces[1])
