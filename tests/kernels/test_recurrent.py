"""The kernels of recurrent layers (kernels/ssm.metal) against the formulas in float64 NumPy.

A sequence is one array of inputs. A step works on some of its positions; the ring of convolution inputs and the
recurrent state carry the earlier ones. Everything that a step must not read is NaN.
"""

from __future__ import annotations

import numpy as np
import pytest

from support.kernel_lab import Lab, assert_close, assert_untouched, every_lane
from support.kernels.recurrent import F64, SHAPES, Layer, Shape, convolved, delta_rule, f64, gated_norm, unit
from support.kernels.rows import padded

every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
every_class = pytest.mark.parametrize("shape", [SHAPES[i] for i in (2, 4, 6)], ids=str)


def state_scales(state: F64) -> F64:
    """Returns the scales of a state's errors, [n_v, d_v, d_k]: the magnitude plus the head's root mean square."""
    return np.abs(state) + np.sqrt(np.mean(state * state, axis=(1, 2), keepdims=True))


# ---- kernel by kernel --------------------------------------------------------------------------------------------

STEPS = [(0, 1, 1), (0, 2, 5), (3, 1, 1), (5, 3, 3), (1, 17, 17), (7, 33, 40), (2, 40, 40)]
every_step = pytest.mark.parametrize(("pos", "n_tokens", "rows"), STEPS, ids=[f"pos{p}-T{n}of{r}" for p, n, r in STEPS])


@every_lane
@every_shape
@every_step
def test_ssm_conv1d(lane: str, shape: Shape, pos: int, n_tokens: int, rows: int) -> None:
    lab = Lab(lane)
    layer = Layer(lab, shape, pos + n_tokens)
    ring = layer.ring(pos)
    conv_state = lab.in_out(ring)
    out = layer.conv1d(pos, n_tokens, rows, conv_state)
    want = convolved(shape, f64(layer.qkv), f64(layer.conv_w))[pos:]
    for got_heads, want_heads in zip(shape.split(out.array[:n_tokens]), shape.split(want), strict=True):
        assert_close(got_heads, want_heads, 1e-6)
    assert_untouched(out.array[n_tokens:])
    for p in range(max(pos, pos + n_tokens - shape.d_conv), pos + n_tokens):
        ring[p % shape.d_conv] = layer.qkv[p]
    assert np.array_equal(conv_state.array, ring, equal_nan=True)


@every_lane
@every_shape
@every_step
def test_ssm_delta(lane: str, shape: Shape, pos: int, n_tokens: int, rows: int) -> None:
    lab = Lab(lane)
    layer = Layer(lab, shape, pos + n_tokens)
    q, k, v = (f64(lab.normal(n_tokens, *x.shape[1:])) for x in shape.split(np.zeros((1, shape.channels))))
    qkv = np.full((rows, shape.channels), np.nan, np.float32)
    heads = [unit(q) / np.sqrt(shape.d_k), unit(k), v]
    qkv[:n_tokens] = np.concatenate([x.reshape(n_tokens, -1) for x in heads], axis=1)
    before = lab.normal(shape.n_v, shape.d_v, shape.d_k)
    if pos == 0:
        before[...] = np.nan
    state = lab.in_out(before)
    out = layer.delta(pos, n_tokens, lab.input(qkv), state)
    decay, beta = (gate[pos:] for gate in layer.gates)
    want, want_state, scale = delta_rule(shape, f64(qkv[:n_tokens]), decay, beta, np.nan_to_num(f64(before)))
    assert_close(out.array[:n_tokens].reshape(want.shape), want, 1e-6, scale)
    assert_untouched(out.array[n_tokens:])
    assert_close(state.array, want_state, 1e-6)


@every_lane
@every_shape
@pytest.mark.parametrize(("n_tokens", "rows"), [(1, 1), (3, 5)])
@pytest.mark.parametrize("scale", [0.0, 1e-6, 1.0, 1e6])
def test_ssm_norm(lane: str, shape: Shape, n_tokens: int, rows: int, scale: float) -> None:
    lab = Lab(lane)
    layer = Layer(lab, shape, n_tokens)
    o = padded(lab, rows, n_tokens, shape.n_v * shape.d_v, scale=scale)
    out = layer.norm(0, n_tokens, lab.input(o))
    heads = (n_tokens, shape.n_v, shape.d_v)
    want = gated_norm(f64(o[:n_tokens]).reshape(heads), f64(layer.z).reshape(heads), f64(layer.norm_w))
    assert_close(out.array[:n_tokens], want.reshape(n_tokens, -1), 1e-6)
    assert_untouched(out.array[n_tokens:])


# ---- sequences: the same in whatever steps -----------------------------------------------------------------------


@every_lane
@every_class
@pytest.mark.parametrize("chunks", [(40,), (1, 1, 3, 2, 20, 13), (16, 17, 7)], ids=str)
def test_chunks_and_single_tokens_give_the_whole(lane: str, shape: Shape, chunks: tuple[int, ...]) -> None:
    """Chunks of many tokens, then ssm_step for single ones, from a poisoned state."""
    lab = Lab(lane)
    n_single = 5
    layer = Layer(lab, shape, sum(chunks) + n_single)
    conv_state, state = layer.poisoned()
    pos, parts = 0, []
    for n in chunks:
        parts.append(layer.chunk(pos, n, max(n, 32), conv_state, state))
        pos += n
    for _ in range(n_single):
        parts.append(layer.step(pos, conv_state, state))
        pos += 1
    want, want_state, scales = layer.expected()
    assert_close(np.concatenate(parts), want, 2e-6, scales)
    assert_close(state.array, want_state, 2e-6, state_scales(want_state))
    for p in range(pos - shape.d_conv, pos):
        assert np.array_equal(conv_state.array[p % shape.d_conv], layer.qkv[p])


@every_lane
@every_class
@pytest.mark.parametrize("threads", [32, 0, 1024], ids=["32 threads", "as launched", "1024 threads"])
def test_token_by_token(lane: str, shape: Shape, threads: int) -> None:
    lab = Lab(lane)
    layer = Layer(lab, shape, 12)
    if threads > lab.device.limits(f"ssm_step_{shape.head_class}")[0]:
        pytest.skip("more threads than this kernel may have on this device")
    conv_state, state = layer.poisoned()
    out = np.concatenate([layer.step(pos, conv_state, state, threads=threads) for pos in range(12)])
    want, want_state, scales = layer.expected()
    assert_close(out, want, 2e-6, scales)
    assert_close(state.array, want_state, 2e-6, state_scales(want_state))


@every_lane
def test_an_empty_step_changes_nothing(lane: str) -> None:
    lab, shape = Lab(lane), SHAPES[1]
    layer = Layer(lab, shape, 9)
    ring, before = layer.ring(8), lab.normal(shape.n_v, shape.d_v, shape.d_k)
    conv_state, state = lab.in_out(ring), lab.in_out(before)
    assert layer.chunk(8, 0, 3, conv_state, state).size == 0
    assert_untouched(layer.step(8, conv_state, state, n_tokens=0))
    assert np.array_equal(conv_state.array, ring, equal_nan=True)
    assert np.array_equal(state.array, before)


# ---- values ------------------------------------------------------------------------------------------------------


@every_lane
@pytest.mark.parametrize("kernel", ["delta", "step"])
def test_gates_keep_their_precision_everywhere(lane: str, kernel: str) -> None:
    """With beta 0 a step only decays the state, by e^(a softplus(x)). A large a shows errors of softplus."""
    lab = Lab(lane)
    x = np.array([-1e30, -200, -103, -88, -50, -30, -20, -10, -3, -1, -1e-3, 0, 1e-6, 0.3, 2, 10, 19, 21, 60, 3e38])
    shape = Shape(1, len(x), 32, 32, 2)
    layer = Layer(lab, shape, 2)
    layer.alpha[:] = x
    layer.dt_bias[:] = 0
    layer.beta[:] = -1e30
    soft = np.logaddexp(0.0, f64(layer.alpha[0]))
    layer.a = (-1.0 / np.maximum(soft, 1e-30)).astype(np.float32)
    before = lab.normal(shape.n_v, shape.d_v, shape.d_k)
    state = lab.in_out(before)
    if kernel == "step":
        layer.step(1, lab.in_out(layer.ring(1)), state)
    else:
        layer.delta(1, 1, lab.input(layer.qkv[:1]), state)
    assert_close(state.array, layer.gates[0][1][:, None, None] * f64(before), 1e-6)


def check_chunk_and_steps(layer: Layer, n_chunk: int, n: int) -> None:
    """Runs a chunk of tokens, then single ones up to ``n``, and compares the outputs and the state after them."""
    conv_state, state = layer.poisoned()
    parts = [layer.chunk(0, n_chunk, n_chunk, conv_state, state)]
    parts += [layer.step(pos, conv_state, state) for pos in range(n_chunk, n)]
    want, want_state, _ = layer.expected()
    assert_close(np.concatenate(parts), want, 1e-5)
    assert_close(state.array, want_state, 1e-5)


@every_lane
@pytest.mark.parametrize("scale", [0.0, 1e-8, 1e-4, 1e4])
def test_heads_of_any_length(lane: str, scale: float) -> None:
    """eps carries q and k of length 0; large inputs still become unit vectors."""
    lab, shape = Lab(lane), SHAPES[1]
    layer = Layer(lab, shape, 20, qkv_scale=scale)
    check_chunk_and_steps(layer, 17, 20)


@every_lane
@pytest.mark.parametrize("alpha_scale", [30.0, 1e4, 1e30])
def test_extreme_gates(lane: str, alpha_scale: float) -> None:
    """Gates that forget all or nothing, and learn all or nothing."""
    lab, shape = Lab(lane), SHAPES[1]
    layer = Layer(lab, shape, 36, alpha_scale=alpha_scale)
    check_chunk_and_steps(layer, 33, 36)
