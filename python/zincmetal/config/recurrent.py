"""Recurrent layers: their sizes and their states."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from ..gguf.metadata import Keys


@dataclass(frozen=True)
class Ssm:
    """Gated-DeltaNet layer: heads of ``d_state`` keys and as many values, behind a causal convolution."""

    n_k_head: int
    n_v_head: int
    d_state: int
    d_conv: int

    @property
    def d_inner(self) -> int:
        """Values of all heads."""
        return self.n_v_head * self.d_state

    @property
    def channels(self) -> int:
        """Channels of the convolution: q, k and v of all heads."""
        return 2 * self.n_k_head * self.d_state + self.d_inner

    @property
    def slot_floats(self) -> dict[str, int]:
        """Numbers that a sequence keeps in each layer, by the kind of the state."""
        return {"ssm_conv": self.d_conv * self.channels, "ssm_state": self.d_inner * self.d_state}


@dataclass(frozen=True)
class Mamba2:
    """Mamba2 layer: heads of ``d_head`` values with ``d_state`` numbers each, behind a causal convolution.

    The heads of a group share B and C.
    """

    n_head: int
    n_group: int
    d_head: int
    d_state: int
    d_conv: int

    @property
    def d_inner(self) -> int:
        """Values of all heads."""
        return self.n_head * self.d_head

    @property
    def channels(self) -> int:
        """Channels of the convolution: x of all heads, B and C of all groups."""
        return self.d_inner + 2 * self.n_group * self.d_state

    @property
    def d_in(self) -> int:
        """Inputs of a token: z of all heads, the channels, and dt of each head."""
        return self.d_inner + self.channels + self.n_head

    @property
    def slot_floats(self) -> dict[str, int]:
        """Numbers that a sequence keeps in each layer, by the kind of the state."""
        return {"ssm_conv": self.d_conv * self.channels, "ssm_state": self.d_inner * self.d_state}


@dataclass(frozen=True)
class ShortConv:
    """Short convolution layer (LFM2): ``channels``, each convolved over the last ``taps`` positions."""

    channels: int
    taps: int

    @property
    def slot_floats(self) -> dict[str, int]:
        """Numbers that a sequence keeps in each layer, by the kind of the state."""
        return {"short_conv": (self.taps - 1) * self.channels}


#: Sizes of a model's recurrent layers, by what they compute. Each has ``slot_floats``.
Recurrence: TypeAlias = Ssm | Mamba2 | ShortConv


def read_ssm(keys: Keys) -> Ssm:
    """Read the sizes of gated-DeltaNet layers."""
    n_k_head, n_v_head = keys.size("ssm.group_count"), keys.size("ssm.time_step_rank")
    d_state, d_inner = keys.size("ssm.state_size"), keys.size("ssm.inner_size")
    d_conv = keys.size("ssm.conv_kernel")
    if n_v_head % n_k_head:
        raise keys.bad("ssm.group_count", f"{n_k_head} does not divide the {n_v_head} value heads (ssm.time_step_rank)")
    if n_v_head * d_state != d_inner:
        raise keys.bad("ssm.inner_size", f"{d_inner} is not {n_v_head} heads of ssm.state_size {d_state}")
    return Ssm(n_k_head, n_v_head, d_state, d_conv)


def read_mamba2(keys: Keys) -> Mamba2:
    """Read the sizes of Mamba2 layers."""
    n_head, n_group = keys.size("ssm.time_step_rank"), keys.size("ssm.group_count")
    d_state, d_inner = keys.size("ssm.state_size"), keys.size("ssm.inner_size")
    if n_head % n_group:
        raise keys.bad("ssm.group_count", f"{n_group} does not divide the {n_head} heads (ssm.time_step_rank)")
    if d_inner % n_head:
        raise keys.bad("ssm.inner_size", f"{d_inner} is not a multiple of the {n_head} heads (ssm.time_step_rank)")
    return Mamba2(n_head, n_group, d_inner // n_head, d_state, keys.size("ssm.conv_kernel"))


def read_short_conv(keys: Keys) -> ShortConv:
    """Read the sizes of short convolutions."""
    return ShortConv(keys.size("embedding_length"), keys.size("shortconv.l_cache"))


def read_recurrent(keys: Keys, n_block: int) -> tuple[bool, ...]:
    """Return for each block whether it is recurrent.

    The file lists the recurrent blocks, or gives them 0 heads, or every ``full_attention_interval``-th block attends.
    """
    if not keys.has("attention.recurrent_layers"):
        heads = keys.sizes("attention.head_count_kv", n_block, 1, least=0)
        if 0 in heads and not keys.has("full_attention_interval"):
            return tuple(n == 0 for n in heads)
        interval = keys.size("full_attention_interval", 4)
        return tuple((i + 1) % interval != 0 for i in range(n_block))
    keys.get("full_attention_interval", 0)  # the list replaces it
    return keys.flags("attention.recurrent_layers", n_block)
