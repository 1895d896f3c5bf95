"""The file: opened, checked, mapped; its metadata and its table of tensors."""

from .file import File, Metadata, Part, TensorInfo, open, plain

__all__ = ["File", "Metadata", "Part", "TensorInfo", "open", "plain"]
