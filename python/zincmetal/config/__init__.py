"""Sizes and constants of a model, read from its metadata and checked once: a frozen :class:`ModelConfig`."""

from .experts import Experts, Router
from .latent import Latent
from .layers import Layer
from .model import ModelConfig, from_file
from .pooling import Pooling
from .recurrent import Mamba2, Recurrence, ShortConv, Ssm
from .rope import Rope, Temperature
from .traits import Traits

__all__ = [
    "Experts",
    "Latent",
    "Layer",
    "Mamba2",
    "ModelConfig",
    "Pooling",
    "Recurrence",
    "Rope",
    "Router",
    "ShortConv",
    "Ssm",
    "Temperature",
    "Traits",
    "from_file",
]
