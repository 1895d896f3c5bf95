"""Rotary frequencies and their magnitude against float64 computations of the published formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest

from zincmetal.config import Rope

DIMS = [8, 32, 64, 96, 128]
every_size = pytest.mark.parametrize("n_rot", DIMS)


def plain(base: float, n_rot: int) -> np.ndarray:
    return 1.0 / base ** (np.arange(0, n_rot, 2) / n_rot)


def yarn(base: float, n_rot: int, factor: float, n_orig: int, fast: float, slow: float, truncate: bool) -> np.ndarray:
    """Computes YaRN's frequencies as the reference implementation does: by wavelengths, pair for pair."""
    found = []
    ends = [n_rot * math.log(n_orig / (turns * 2 * math.pi)) / (2 * math.log(base)) for turns in (fast, slow)]
    low, high = (math.floor(ends[0]), math.ceil(ends[1])) if truncate else ends
    low, high = max(low, 0), min(high, n_rot - 1)
    for i, extrapolated in enumerate(plain(base, n_rot)):
        ramp = min(max((i - low) / (high - low if high > low else 0.001), 0.0), 1.0)
        found.append(extrapolated / factor * ramp + extrapolated * (1 - ramp))
    return np.array(found)


def llama3(base: float, n_rot: int, factor: float, low: float, high: float, n_orig: int) -> np.ndarray:
    """Computes Llama 3.1's frequencies from the wavelengths of the pairs."""
    found = []
    for freq in plain(base, n_rot):
        wavelength = 2 * math.pi / freq
        smooth = min(max((n_orig / wavelength - low) / (high - low), 0.0), 1.0)
        found.append((1 - smooth) * freq / factor + smooth * freq)
    return np.array(found)


@every_size
@pytest.mark.parametrize("truncate", [True, False])
@pytest.mark.parametrize(
    ("base", "factor", "n_orig", "fast", "slow"),
    [
        (10_000.0, 4.0, 4096, 32.0, 1.0),
        (1e6, 16.0, 16384, 32.0, 1.0),
        (150_000.0, 32.0, 4096, 32.0, 1.0),
        (500_000.0, 8.0, 8192, 4.0, 2.0),
        (1e6, 1.5, 64, 32.0, 1.0),  # no pair turns 32 times
        (1e4, 40.0, 2**20, 1.0, 1.0),
    ],
)
def test_yarn(n_rot: int, truncate: bool, base: float, factor: float, n_orig: int, fast: float, slow: float) -> None:
    rope = Rope(base, "yarn", factor, n_orig, beta_fast=fast, beta_slow=slow, whole_pairs=truncate)
    want = yarn(base, n_rot, factor, n_orig, fast, slow, truncate)
    np.testing.assert_allclose(rope.frequencies(n_rot), want, rtol=1e-6)


@pytest.mark.parametrize(
    ("factor", "log_multiplier", "attn_factor", "want"),
    [
        (4.0, 0.0, 1.0, 1.1386294361119891),  # 0.1 ln 4 + 1
        (16.0, 1.0, 1.0, 1.0),
        (40.0, 0.707, 1.0, (0.1 * math.log(40) + 1) / (0.0707 * math.log(40) + 1)),
        (4.0, 0.0, 0.5, 0.56931471805599453),
        (1.0, 0.5, 1.25, 1.25),
    ],
)
def test_magnitude_of_yarn(factor: float, log_multiplier: float, attn_factor: float, want: float) -> None:
    rope = Rope(1e4, "yarn", factor, 4096, log_multiplier=log_multiplier, attn_factor=attn_factor)
    assert rope.magnitude == pytest.approx(want, rel=1e-15)


def test_magnitude_of_others() -> None:
    assert Rope(1e4, "linear", 8.0).magnitude == 1.0
    assert Rope(1e4, attn_factor=1.19).magnitude == 1.19


@every_size
def test_divisors_of_llama3_give_its_frequencies(n_rot: int) -> None:
    """The file has the quotient of the plain and the scaled frequencies, in float32."""
    want = llama3(500_000.0, n_rot, 8.0, 1.0, 4.0, 8192)
    divisors = (plain(500_000.0, n_rot) / want).astype(np.float32)
    np.testing.assert_allclose(Rope(500_000.0).frequencies(n_rot, divisors), want, rtol=2e-7)


@every_size
def test_linear_scaling_and_divisors(n_rot: int) -> None:
    divisors = np.random.default_rng().uniform(1, 40, n_rot // 2).astype(np.float32)
    want = plain(1e4, n_rot) / divisors / 8.0
    np.testing.assert_allclose(Rope(1e4, "linear", 8.0).frequencies(n_rot, divisors), want, rtol=1e-6)
