"""``zincmetal inspect``: prints the metadata, tensors and types of a GGUF file."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from math import prod
from typing import TYPE_CHECKING, Any

from ..errors import TokenizerError, abbreviate, quote
from .arguments import Parser, add_model, model_path
from .command import Command
from .output import print_json

if TYPE_CHECKING:
    from ..gguf import File
    from ..gguf.quants import QuantType


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``python -m zincmetal.gguf`` and return the exit status."""
    return COMMAND.main(argv, "gguf")


def add_arguments(p: Parser) -> None:
    """Add the options of ``inspect``."""
    add_model(p)
    p.add_argument("--json", action="store_true", help="print one JSON object, with every value in full")


def run(args: argparse.Namespace) -> int:
    """Print the metadata and the tensor table of a file."""
    from .. import gguf

    with gguf.open(model_path(args)) as file:
        if args.json:
            print_json(_figures(file))
        else:
            for lines in (_describe(file), _describe_use(file)):
                for line in lines:
                    print(line)
    return 0


def _describe(file: File) -> Iterator[str]:
    """Describe the file as tables: parts, keys, tensors, types."""
    from ..gguf.file import plain

    for part in file.parts:
        yield f"{part.path}: {part.size:,} bytes"
    yield f"\n{len(file.metadata)} keys"
    for key in file.metadata:
        yield f"  {plain(key):<44} {file.metadata.type_name(key):<14} {abbreviate(file.metadata[key])}"
    yield f"\n{len(file.tensors)} tensors: type, shape (slowest dimension first), bytes, part, offset in the part"
    for t in file.tensors.values():
        shape = "x".join(map(str, t.shape)) or "scalar"
        place = f"{t.nbytes:>14,} {t.part:>3} {t.offset:>14,}"
        yield f"  {plain(t.name):<44} {t.type.name:<8} {shape:<20} {place}"
    yield "\ntypes: tensors, weights, bytes"
    for qtype, (n, weights, nbytes) in _types(file).items():
        note = "" if qtype.supported else "  (zincmetal does not compute with this type)"
        yield f"  {qtype.name:<8} {n:>6} {weights:>16,} {nbytes:>16,}{note}"


def _types(file: File) -> dict[QuantType, tuple[int, int, int]]:
    """Count the tensors, weights and bytes of each quant type in the file."""
    from ..gguf import quants

    found = {}
    for qtype in quants.ALL:
        tensors = [t for t in file.tensors.values() if t.type is qtype]
        if tensors:
            found[qtype] = len(tensors), sum(prod(t.shape) for t in tensors), sum(t.nbytes for t in tensors)
    return found


def _describe_use(file: File) -> Iterator[str]:
    """Describe how generation uses the metadata: begin and end tokens, the sampling of chat."""
    from ..sampling.defaults import chat_defaults
    from ..text.tokenizer import Tokenizer

    if "tokenizer.ggml.model" not in file.metadata:
        return
    yield "\ntext"
    try:
        tokenizer = Tokenizer.from_metadata(file.metadata)
    except TokenizerError as error:
        yield f"  only token ids: {error}"
        return

    def named(token: int) -> str:
        return f"{token} {quote(tokenizer.token_bytes(token).decode('utf-8', 'replace'))}"

    begins = "none" if tokenizer.bos_id is None else named(tokenizer.bos_id)
    if tokenizer.bos_id is not None and not tokenizer.add_bos:
        begins += ", not added to a prompt"
    yield f"  begin token: {begins}"
    yield f"  end tokens: {', '.join(map(named, sorted(tokenizer.eog_ids))) or 'none'}"
    if any(key.startswith("tokenizer.chat_template") for key in file.metadata):
        said = (f"{name} {value:g}" for name, value in chat_defaults(file.metadata).items())
        yield f"  sampling of chat without options: {', '.join(said) or 'greedy'}"


def _figures(file: File) -> dict[str, Any]:
    """Return the file for ``--json``. Offsets are bytes in the part. Shapes have the slowest dimension first."""
    return {
        "parts": [{"path": str(part.path), "bytes": part.size} for part in file.parts],
        "metadata": {
            key: {"type": file.metadata.type_name(key), "value": _plain_value(file.metadata[key])}
            for key in file.metadata
        },
        "tensors": [
            {
                "name": t.name,
                "type": t.type.name,
                "shape": list(t.shape),
                "bytes": t.nbytes,
                "part": t.part,
                "offset": t.offset,
            }
            for t in file.tensors.values()
        ],
        "types": {
            qtype.name: {"tensors": n, "weights": weights, "bytes": nbytes, "supported": qtype.supported}
            for qtype, (n, weights, nbytes) in _types(file).items()
        },
    }


def _plain_value(value: Any) -> Any:
    """Convert a metadata value for JSON: an array becomes a list."""
    return value.tolist() if hasattr(value, "tolist") else value


COMMAND = Command(
    "inspect",
    "show the metadata, tensors and types of a GGUF file",
    add_arguments,
    run,
    (
        ("inspect MODEL.gguf", "every key and every tensor"),
        ("inspect MODEL.gguf --json | jq '.metadata[\"general.name\"].value'", "one value, in full"),
    ),
    reader_gone=0,
)
