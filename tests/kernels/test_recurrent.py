"""The kernels of recurrent layers (kernels/ssm.metal) against the formulas in float64 NumPy.

A sequence is one array of inputs. A run of a step works on some of its positions; the ring of convolution inputs and
the recurrent state of a slot carry the earlier ones. Everything that a step must not read is NaN.
"""

from __future__ import annotations

import numpy as np
import pytest

from support.kernel_lab import Guarded, Lab, assert_close, assert_untouched, every_lane
from support.kernels.recurrent import (
    SHAPES,
    Layer,
    Shape,
    convolved,
    delta_rule,
    f64,
    gated_norm,
    unit,
)
from support.kernels.rows import padded
from support.kernels.states import (
    F32,
    assert_same_bits,
    assert_untouched_slots,
    check_empty_step,
    check_end,
    check_side_by_side,
    random_runs,
)
from support.step_rows import Run, StepRows

every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
every_class = pytest.mark.parametrize("shape", [SHAPES[i] for i in (2, 4, 6, 10)], ids=str)


# ---- kernel by kernel --------------------------------------------------------------------------------------------

STEPS = [(0, 1, 1), (0, 2, 5), (3, 1, 1), (5, 3, 3), (1, 17, 17), (7, 33, 40), (2, 40, 40)]
every_step = pytest.mark.parametrize(("pos", "n_tokens", "rows"), STEPS, ids=[f"pos{p}-T{n}of{r}" for p, n, r in STEPS])
#: Runs of one row, longer runs, and the most rows of those.
MIXTURES = [(5, 0, 0), (0, 4, 9), (4, 3, 20)]
every_mixture = pytest.mark.parametrize(("n_single", "n_long", "longest"), MIXTURES)


def check_conv1d(layer: Layer, runs: list[Run], n_slots: int, rows: int) -> None:
    """Runs ssm_conv1d on these runs and compares its outputs. It may only read the rings."""
    shape, batch = layer.shape, StepRows(layer.lab, runs, rows)
    conv_state, _ = layer.states_before(runs, n_slots)
    out = layer.conv1d(batch, conv_state)
    whole = [convolved(shape, f64(of.qkv), f64(layer.conv_w)) for of in layer.sequences]
    want = np.concatenate([whole[run.sequence][run.pos : run.end] for run in runs])
    for got_heads, want_heads in zip(shape.split(out.array[: batch.n_tokens]), shape.split(want), strict=True):
        assert_close(got_heads, want_heads, 1e-6)
    assert_untouched(out.array[batch.n_tokens :])


@every_lane
@every_shape
@every_step
def test_ssm_conv1d(lane: str, shape: Shape, pos: int, n_tokens: int, rows: int) -> None:
    layer = Layer(Lab(lane), shape, pos + n_tokens)
    check_conv1d(layer, [Run(0, pos, n_tokens)], 1, rows)


@every_lane
@every_shape
@every_mixture
def test_ssm_conv1d_of_runs(lane: str, shape: Shape, n_single: int, n_long: int, longest: int) -> None:
    layer = Layer(Lab(lane), shape)
    runs, n_slots = random_runs(layer, n_single, n_long, longest)
    check_conv1d(layer, runs, n_slots, sum(run.n for run in runs) + 3)


def convolutions(layer: Layer, batch: StepRows) -> F32:
    """Makes random results of ssm_conv1d, then NaN."""
    shape, n = layer.shape, batch.n_tokens
    q, k, v = (f64(layer.lab.normal(n, *x.shape[1:])) for x in shape.split(np.zeros((1, shape.channels))))
    qkv = np.full((len(batch.rows), shape.channels), np.nan, np.float32)
    heads = [unit(q) / np.sqrt(shape.d_k), unit(k), v]
    qkv[:n] = np.concatenate([x.reshape(n, -1) for x in heads], axis=1)
    return qkv


def check_delta(layer: Layer, runs: list[Run], n_slots: int, rows: int, n_z: int = 1) -> tuple[Guarded, ...]:
    """Runs ssm_delta on these runs and compares its outputs, states and rings. Returns them."""
    lab, shape, batch = layer.lab, layer.shape, StepRows(layer.lab, runs, rows)
    qkv = convolutions(layer, batch)
    conv_state, state = layer.states_before(runs, n_slots)
    rings, before = conv_state.array.copy(), state.array.copy()
    out = layer.delta(batch, lab.input(qkv), conv_state, state, n_z)
    first = 0
    for run in runs:
        decay, beta = (gate[run.pos :] for gate in layer.gates(run.sequence))
        start = f64(before[run.slot]) if run.pos else np.zeros(before.shape[1:])
        part = slice(first, first := first + run.n)
        want, want_state, scale = delta_rule(shape, f64(qkv[part]), decay, beta, start)
        # Sixteen tokens at a time sum more terms than one: 1.04e-6 was met.
        assert_close(out.array[part].reshape(want.shape), want, 2e-6, scale)
        assert_close(state.array[run.slot_out], want_state, 2e-6)
    assert_untouched(out.array[batch.n_tokens :])
    assert_untouched_slots(state.array, before, runs)
    assert_same_bits(conv_state.array, layer.rings_after(rings, runs))
    return out, conv_state, state


@every_lane
@every_shape
@every_step
def test_ssm_delta(lane: str, shape: Shape, pos: int, n_tokens: int, rows: int) -> None:
    layer = Layer(Lab(lane), shape, pos + n_tokens)
    check_delta(layer, [Run(0, pos, n_tokens)], 1, rows)


@every_lane
@every_shape
@every_mixture
def test_ssm_delta_of_runs(lane: str, shape: Shape, n_single: int, n_long: int, longest: int) -> None:
    layer = Layer(Lab(lane), shape)
    runs, n_slots = random_runs(layer, n_single, n_long, longest)
    check_delta(layer, runs, n_slots, sum(run.n for run in runs) + 3, int(layer.lab.rng.integers(1, 9)))


@every_lane
@every_shape
@pytest.mark.parametrize(("n_tokens", "rows"), [(1, 1), (3, 5)])
@pytest.mark.parametrize("scale", [0.0, 1e-6, 1.0, 1e6])
def test_ssm_norm(lane: str, shape: Shape, n_tokens: int, rows: int, scale: float) -> None:
    lab = Lab(lane)
    layer = Layer(lab, shape, n_tokens)
    o = padded(lab, rows, n_tokens, shape.n_v * shape.d_v, scale=scale)
    out = layer.norm(StepRows(lab, [Run(0, 0, n_tokens)], rows), lab.input(o))
    heads = (n_tokens, shape.n_v, shape.d_v)
    z = f64(layer.sequences[0].z)
    want = gated_norm(f64(o[:n_tokens]).reshape(heads), z.reshape(heads), f64(layer.norm_w))
    assert_close(out.array[:n_tokens], want.reshape(n_tokens, -1), 1e-6)
    assert_untouched(out.array[n_tokens:])


@every_lane
@every_shape
def test_ssm_ungroup(lane: str, shape: Shape) -> None:
    """Each k head has q, k, and v and z of its v heads side by side."""
    layer = Layer(Lab(lane), shape)
    values = shape.n_v // shape.n_k * shape.d_v
    heads = layer.lab.normal(3, shape.n_k, 2 * (shape.d_k + values))
    x = np.full((5, shape.n_k * heads.shape[2]), np.nan, np.float32)
    x[:3] = heads.reshape(3, -1)
    qkv, z = layer.ungroup(StepRows(layer.lab, [Run(0, 0, 3)], 5), layer.lab.input(x))
    parts = np.split(heads, np.cumsum([shape.d_k, shape.d_k, values]), axis=2)
    *want, want_z = (part.reshape(3, -1) for part in parts)
    assert_same_bits(qkv.array[:3], np.concatenate(want, axis=1))
    assert_same_bits(z.array[:3], want_z)
    for out in (qkv, z):
        assert_untouched(out.array[3:])


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
        batch = StepRows(lab, [Run(0, pos, n)], max(n, 32))
        parts.append(layer.chunk(batch, conv_state, state))
        pos += n
    for _ in range(n_single):
        parts.append(layer.run([Run(0, pos)], conv_state, state))
        pos += 1
    check_end(layer, 0, np.concatenate(parts), conv_state.array[0], state.array[0])


@every_lane
@every_class
@pytest.mark.parametrize("threads", [32, 0, 1024], ids=["32 threads", "as launched", "1024 threads"])
def test_token_by_token(lane: str, shape: Shape, threads: int) -> None:
    lab = Lab(lane)
    layer = Layer(lab, shape, 12)
    if threads > lab.device.limits(f"ssm_step_{shape.head_class}")[0]:
        pytest.skip("more threads than this kernel may have on this device")
    conv_state, state = layer.poisoned()
    steps = [StepRows(lab, [Run(0, pos)]) for pos in range(12)]
    out = np.concatenate([layer.step(batch, conv_state, state, threads) for batch in steps])
    check_end(layer, 0, out, conv_state.array[0], state.array[0])


@every_lane
@every_class
def test_sequences_side_by_side_in_slots(lane: str, shape: Shape) -> None:
    """Runs of several sequences, in place and moved; forks read one slot and write others."""
    check_side_by_side(Layer(Lab(lane), shape, 9, 21, 14, 3))


@every_lane
@every_shape
@pytest.mark.parametrize("kernel", ["step", "chunk"])
def test_a_run_is_the_same_alone_and_in_place(lane: str, shape: Shape, kernel: str) -> None:
    """Other runs, the grid's z, and moving to another slot change no bit."""
    layer = Layer(Lab(lane), shape)
    runs, n_slots = random_runs(layer, 4, 0 if kernel == "step" else 3, 12)
    conv_state, state = layer.states_before(runs, n_slots)
    rings, states = conv_state.array.copy(), state.array.copy()
    batch = StepRows(layer.lab, runs, 40)
    step = layer.step if kernel == "step" else layer.chunk
    out = step(batch, conv_state, state)
    for n_z in (3, 40) if kernel == "chunk" else ():
        ring, again = layer.lab.in_out(rings), layer.lab.in_out(states)
        assert_same_bits(layer.chunk(batch, ring, again, n_z), out)
        assert_same_bits(ring.array, conv_state.array)
        assert_same_bits(again.array, state.array)
    for run in runs:
        slot = run.slot_out if run.pos == 0 else run.slot
        ring, alone = (layer.lab.in_out(x[slot : slot + 1]) for x in (rings, states))
        of_run, out = out[: run.n], out[run.n :]
        assert_same_bits(step(StepRows(layer.lab, [run._replace(slot=0, slot_out=0)]), ring, alone), of_run)
        assert_same_bits(alone.array[0], state.array[run.slot_out])
        read = [p % shape.d_conv for p in range(max(0, run.end - shape.d_conv), run.end)]
        assert_same_bits(ring.array[0, read], conv_state.array[run.slot_out, read])


@every_lane
@pytest.mark.parametrize("kernel", ["step", "chunk"])
def test_an_empty_step_changes_nothing(lane: str, kernel: str) -> None:
    check_empty_step(Layer(Lab(lane), SHAPES[1], 9), kernel)


# ---- values ------------------------------------------------------------------------------------------------------


@every_lane
@pytest.mark.parametrize("kernel", ["delta", "step"])
def test_gates_keep_their_precision_everywhere(lane: str, kernel: str) -> None:
    """With beta 0 a step only decays the state, by e^(a softplus(x)). A large a shows errors of softplus."""
    lab = Lab(lane)
    x = np.array([-1e30, -200, -103, -88, -50, -30, -20, -10, -3, -1, -1e-3, 0, 1e-6, 0.3, 2, 10, 19, 21, 60, 3e38])
    shape = Shape(1, len(x), 32, 32, 2)
    layer = Layer(lab, shape, 2)
    inputs = layer.sequences[0]
    inputs.alpha[:] = x
    layer.dt_bias[:] = 0
    inputs.beta[:] = -1e30
    soft = np.logaddexp(0.0, f64(inputs.alpha[0]))
    layer.a = (-1.0 / np.maximum(soft, 1e-30)).astype(np.float32)
    batch = StepRows(lab, [Run(0, 1)])
    conv_state, state = layer.states_before(batch.runs, 1)
    before = state.array[0].copy()
    if kernel == "step":
        layer.step(batch, conv_state, state)
    else:
        layer.delta(batch, lab.input(inputs.qkv[:1]), conv_state, state)
    assert_close(state.array[0], layer.gates()[0][1][:, None, None] * f64(before), 1e-6)


def check_chunk_and_steps(layer: Layer, n_chunk: int, n: int) -> None:
    """Runs a chunk of tokens, then single ones up to ``n``, and compares the outputs and the state after them."""
    conv_state, state = layer.poisoned()
    parts = [layer.run([Run(0, 0, n_chunk)], conv_state, state)]
    parts += [layer.run([Run(0, pos)], conv_state, state) for pos in range(n_chunk, n)]
    want, want_state, _ = layer.expected()
    assert_close(np.concatenate(parts), want, 1e-5)
    assert_close(state.array[0], want_state, 1e-5)


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
