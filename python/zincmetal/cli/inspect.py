"""``zincmetal inspect FILE``: what a GGUF file holds."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

from .. import gguf
from ..errors import TokenizerError, abbreviate, quote
from ..gguf import File, quants
from ..gguf.file import plain
from .arguments import Parser
from .output import command


def _describe(file: File) -> Iterator[str]:
    """The lines that ``python -m zincmetal.gguf`` prints."""
    for part in file.parts:
        yield f"{part.path}: {part.size:,} bytes"
    yield f"\n{len(file.metadata)} keys"
    for key in file.metadata:
        yield f"  {plain(key):<44} {file.metadata.type_name(key):<14} {abbreviate(file.metadata[key])}"
    yield f"\n{len(file.tensors)} tensors: type, shape (slowest dimension first), bytes, part, offset in it"
    for t in file.tensors.values():
        shape = "x".join(map(str, t.shape)) or "scalar"
        place = f"{t.nbytes:>14,} {t.part:>3} {t.offset:>14,}"
        yield f"  {plain(t.name):<44} {t.type.name:<8} {shape:<20} {place}"
    yield "\ntypes: tensors, weights, bytes"
    for qtype in quants.ALL:
        of_type = [t for t in file.tensors.values() if t.type is qtype]
        if of_type:
            weights, nbytes = sum(prod(t.shape) for t in of_type), sum(t.nbytes for t in of_type)
            note = "" if qtype.supported else "  (zincmetal does not compute with this type)"
            yield f"  {qtype.name:<8} {len(of_type):>6} {weights:>16,} {nbytes:>16,}{note}"


def _describe_use(file: File) -> Iterator[str]:
    """What generating text makes of the metadata: begin and end tokens, the sampling of chat."""
    from ..sampling.defaults import chat_defaults
    from ..text.tokenizer import Tokenizer

    if "tokenizer.ggml.model" not in file.metadata:
        return
    yield "\ntext"
    try:
        tokenizer = Tokenizer.from_metadata(file.metadata)
    except TokenizerError as error:
        yield f"  ids alone: {error}"
        return

    def named(token: int) -> str:
        return f"{token} {quote(tokenizer.token_bytes(token).decode('utf-8', 'replace'))}"

    begins = "none" if tokenizer.bos_id is None else named(tokenizer.bos_id)
    if tokenizer.bos_id is not None and not tokenizer.add_bos:
        begins += ", which a prompt does not get"
    yield f"  begin token: {begins}"
    yield f"  end tokens: {', '.join(map(named, sorted(tokenizer.eog_ids))) or 'none'}"
    if any(key.startswith("tokenizer.chat_template") for key in file.metadata):
        said = (f"{name} {value:g}" for name, value in chat_defaults(file.metadata).items())
        yield f"  sampling of chat, where no option says how: {', '.join(said) or 'greedy'}"


def main(argv: list[str] | None = None) -> int:
    """Print the metadata and the tensor table of a file; returns the exit status."""
    parser = Parser(prog="python -m zincmetal.gguf", description=main.__doc__)
    parser.add_argument("file", help="a GGUF file, or any part of a split one")

    def run() -> int:
        with gguf.open(parser.parse_args(argv).file) as file:
            for lines in (_describe(file), _describe_use(file)):
                for line in lines:
                    print(line)
        return 0

    return command(run, "error: ", reader_gone=0)
