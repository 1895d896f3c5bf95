"""Room of the GGUF file: opens, checks and maps it, and reads its metadata and its table of tensors."""

from .file import File, Metadata, Part, TensorInfo, open, plain

__all__ = ["File", "Metadata", "Part", "TensorInfo", "open", "plain"]
