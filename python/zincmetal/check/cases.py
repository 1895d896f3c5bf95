"""Cases: a small operation for every kernel, with random inputs.

Kernel names, parameters and grids come from the lowering that models use. So a check launches a kernel as a model does.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..config import Experts, ModelConfig, Rope, Ssm
from ..device.buffers import step_record
from ..device.core import Core
from ..gguf.quants import F32, Q8_0, SUPPORTED, QuantType, by_name
from ..graph.fuse import fuse, fuse_glu
from ..graph.ops import KV_CACHES, PAGES, RECURRENT, STEP, TOKENS, Op, Operand, Route, State, Value, Weight
from ..plan import tuning
from ..plan.addresses import state_sizes
from ..plan.choices import KV_TYPES
from ..plan.launch import Launch
from ..plan.lower import Lowering
from ..plan.target import Target
from .inputs import POISON, Bytes, random_weights

ROWS, N_TOKENS = 40, 37  # of a step with many rows: more than one tile of tokens, then padding
POS = 70  # of the first row: on the second page of the cache
LONG_POS = 299  # long enough for divided attention: several shares of the keys, and the last one is not full
M, K, N_VOCAB = 71, 512, 5000  # rows and columns of a matrix, logits: two blocks of every type, and partial tiles

MakeScene: TypeAlias = "Callable[..., Scene]"  # from the rows and the operations


@dataclass(frozen=True)
class Scene:
    """Launches of some operations, for a step of ``n_tokens`` tokens in ``rows`` rows, from position ``pos`` on."""

    target: Target
    cfg: ModelConfig
    kv_type: str
    rows: int
    n_tokens: int
    pos: int
    launches: tuple[Launch, ...]
    without: Callable[[str], Sequence[Launch]]  # the launches on a device that lacks a kernel

    def memory(self, core: Core, seed: int) -> dict[str, Bytes]:
        """Make the first content of every operand, by name: random inputs, and poison in outputs."""
        rng = np.random.default_rng(seed)
        sizes = state_sizes(self.cfg, self.target, self.kv_type, self.rows)
        found: dict[str, Bytes] = {}
        for launch in self.launches:
            for arg in launch.args:
                name = arg.operand.name
                if name not in found:
                    made = self._content(arg.operand, sizes, core, rng)
                    found[name] = made if "r" in arg.mode else np.full_like(made, POISON)
        return found

    def _content(self, operand: Operand, sizes: dict[State, int], core: Core, rng: np.random.Generator) -> Bytes:
        if isinstance(operand, Weight):
            return _weights(operand.type, operand.shape, operand.name, rng)
        if isinstance(operand, Value):
            return _bytes(rng.standard_normal((1 if operand.last else self.rows) * operand.width, np.float32))
        if operand == STEP:
            return _bytes(step_record(core, self.n_tokens, self.pos))
        if operand == TOKENS:
            return _bytes(rng.integers(0, self.cfg.n_vocab, self.rows, np.int32))
        if operand == PAGES:
            return _bytes(rng.permutation(sizes[PAGES] // 4).astype(np.uint32))
        cache = by_name(self.kv_type) if operand.kind in KV_CACHES else F32
        return _weights(cache, (sizes[operand] // cache.block_bytes * cache.block_size,), operand.kind, rng)


@dataclass(frozen=True)
class Case:
    """Kernel in a scene. The launches before it write its inputs."""

    scene: Scene
    index: int

    @property
    def launch(self) -> Launch:
        """Launch of the kernel."""
        return self.scene.launches[self.index]

    @property
    def seed(self) -> int:
        """Seed of its inputs. It depends on the kernel's name alone, so a failure can be repeated."""
        return zlib.crc32(self.launch.kernel.encode())

    @property
    def replacements(self) -> list[str]:
        """Kernels that plans use if a device cannot build this one; none if there are none."""
        kernel = self.launch.kernel
        return list(dict.fromkeys(other.kernel for other in self.scene.without(kernel) if kernel in other.replaces))


def cases(core: Core, backend: str = "") -> dict[str, Case]:
    """Make a case for every kernel that a plan can launch, by name. Row counts of ``backend`` come first."""
    found: dict[str, Case] = {}
    for splits in (tuning.SPLITS.get(backend, {}), {}, *tuning.SPLITS.values()):
        for scene in _scenes(replace(Target.of_kernels(core), splits=splits)):
            for i, launch in enumerate(scene.launches):
                found.setdefault(launch.kernel, Case(scene, i))
    return found


def _weights(qtype: QuantType, shape: Sequence[int], name: str, rng: np.random.Generator) -> Bytes:
    """Make random weights of root mean square 1/8, or 1 for f32."""
    if name == "rope_freqs":
        return _bytes(rng.random(shape, np.float32))
    if name == "ssm_a":  # the rate of a decay
        return _bytes(-np.abs(rng.standard_normal(shape, np.float32)))
    return _bytes(random_weights(qtype, shape, rng, size=1.0 if qtype is F32 else 1 / 8))


def _bytes(values: NDArray[np.generic]) -> Bytes:
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8)


# ---- operations of every family -----------------------------------------------------------------------------


def _scenes(target: Target) -> Iterator[Scene]:
    scene = partial(_scene, target)
    for qtype in SUPPORTED:
        yield from _products(target, scene, qtype)
        if qtype.name in target.expert_types:
            yield from _mixtures(target, scene, qtype)
    yield from _choices(target, scene)
    yield from _rows_of_values(target, scene)
    yield from _caches(target, scene)
    yield from _recurrent(target, scene)
    yield from (scene(1, Op(kind)) for kind in ("argmax", "candidates"))


def _products(target: Target, scene: MakeScene, qtype: QuantType) -> Iterator[Scene]:
    w, up, small = Weight("w", qtype, (M, K)), Weight("up", qtype, (M, K)), Weight("small", F32, (3, K))
    limits = target.fusible
    x, y, residual, scale = Value("x", K), Value("y", M), Value("residual", M), Value("scale", 3)
    product, product_up = (Op("linear", weight=of, x=x, out=Value(f"{of.name}.out", M)) for of in (w, up))
    yield scene(ROWS, Op("embed", table=Weight("table", qtype, (N_VOCAB, K)), out=x, scale=1.5))
    for rows in (1, ROWS):
        yield scene(rows, Op("linear", weight=w, x=x, out=y))
        yield scene(rows, *fuse([product, Op("add", a=residual, b=product.out, out=y)], rows, limits))
        shared = Op("add_shared", weights=scale, y=product.out, residual=residual, out=y)
        yield scene(rows, *fuse([product, shared], rows, limits))
        for glu in ("swiglu", "geglu"):
            gated = [product, product_up, Op(glu, gate=product.out, up=product_up.out, out=y)]
            yield scene(rows, *fuse_glu(gated, limits))
    plain = Op("linear", weight=Weight("plain", qtype, (M + 4, K)), x=x, out=Value("plain.out", M + 4))
    few = Op("linear", weight=small, x=x, out=Value("small.out", 3))
    pair = Op("swiglu", gate=product.out, up=product_up.out, out=y)
    yield scene(1, *fuse([plain, few, product, product_up, pair], 1, limits))


def _choice(n: int, n_used: int) -> tuple[Route, Op]:
    """Make a routing among ``n`` experts, and the operation that computes it."""
    route = Route(
        Value("expert_ids", n_used),
        Value("expert_weights", n_used + 1),
        Value("expert_slots", n_used),
        Value("expert_tiles", 4 * n_used),
        Value("expert_n_tiles", 1),
    )
    return route, Op("route", router=Value("router", n), shared=Value("shared", 1), **route._asdict(), scale=1.0)


def _choices(target: Target, scene: MakeScene) -> Iterator[Scene]:
    for n in target.expert_classes:
        yield scene(ROWS, _choice(n - 3, 8)[1], cfg=_config(experts=Experts(n - 3, 8, K, K, 1.0)))


def _mixtures(target: Target, scene: MakeScene, qtype: QuantType) -> Iterator[Scene]:
    n, n_used, limits = 8, 3, target.fusible
    cfg = _config(experts=Experts(n, n_used, K, K, 1.0))
    route, choose = _choice(n, n_used)
    w, up = (Weight(name, qtype, (n, M, K)) for name in ("w", "up"))
    x, residual, out = Value("x", K), Value("residual", M), Value("out", M)
    each_x, each_y = Value("each_x", n_used * K), Value("each_y", n_used * M)
    routed, outs = route._asdict(), (Value(f"{of.name}.out", n_used * M) for of in (w, up))
    first, second = (Op("experts", **routed, weight=of, x=x, out=to) for of, to in zip((w, up), outs, strict=True))
    (gated,) = fuse_glu([first, second, Op("swiglu", gate=first.out, up=second.out, out=each_y)], limits)
    for rows in (1, ROWS):
        yield scene(rows, choose, first, cfg=cfg)
        yield scene(rows, choose, gated, cfg=cfg)
    mix = Op("mix", weights=route.weights, y=each_y, residual=residual, out=out)
    yield scene(ROWS, choose, mix, cfg=cfg)
    down = Op("experts", **routed, weight=w, x=each_x, out=each_y)
    yield scene(1, choose, *fuse([down, mix], 1, limits), cfg=cfg)
    for shared in dict.fromkeys((qtype, qtype if qtype.name == "f16" else Q8_0)):
        product = Op("linear", weight=Weight("w_shared", shared, (M, K)), x=x, out=Value("shared.out", M))
        added = Op("add_shared", weights=route.weights, y=product.out, residual=residual, out=Value("added", M))
        mixed = mix.replace(residual=added.out)
        yield scene(1, choose, *fuse([product, added, down, mixed], 1, limits), cfg=cfg)


def _rows_of_values(target: Target, scene: MakeScene) -> Iterator[Scene]:
    n = 1500  # more than a threadgroup's columns
    x, other, y, last = Value("x", n), Value("other", n), Value("y", n), Value("last", n, last=True)
    norms = [Weight(name, F32, (n,)) for name in ("norm", "next_norm")]
    norm = Op("rms_norm", x=x, weight=norms[0], out=Value("norm.out", n), eps=1e-6)
    add = Op("add", a=other, b=norm.out, out=y)
    following = Op("rms_norm", x=y, weight=norms[1], out=Value("normed", n), eps=1e-6)
    for ops in ([norm], [norm, add], [norm, add, following]):
        yield scene(ROWS, *fuse(ops, ROWS, target.fusible))
    yield scene(ROWS, Op("add", a=x, b=other, out=y))
    for kind in ("swiglu", "geglu"):
        yield scene(ROWS, Op(kind, gate=x, up=other, out=y))
    yield scene(ROWS, Op("take_last_row", x=x, out=last))


def _caches(target: Target, scene: MakeScene) -> Iterator[Scene]:
    caches = {kind: State(kind, 0) for kind in KV_CACHES}
    for kv_type in KV_TYPES:
        for head_dim in target.head_classes:
            cfg = _config(head_dim=head_dim)
            q, gated, out = Value("q", 4 * head_dim), Value("gated", 8 * head_dim), Value("out", 4 * head_dim)
            attend = Op("attention", q=q, **caches, gate=gated, out=out, scale=head_dim**-0.5, window=0)
            yield scene(1, attend, cfg=cfg, kv_type=kv_type)
            yield scene(ROWS, attend, cfg=cfg, kv_type=kv_type)
            long = _config(head_dim=head_dim, n_ctx=1024)
            yield scene(1, attend, cfg=long, kv_type=kv_type, pos=LONG_POS, divide_above=LONG_POS)
        cfg = _config(head_dim=64, n_rot=48)
        k, v, out = Value("k", 2 * 64), Value("v", 2 * 64), Value("q_out", 4 * 64)
        freqs = Weight("rope_freqs", F32, (24,))
        norms = {name: Weight(name, F32, (64,)) for name in ("q_norm", "k_norm")}
        for rope in ("norm", "neox"):
            for qk_norm in (False, True):
                q = Value("q", (8 if qk_norm else 4) * 64)  # with gates, as the models that have these norms
                chosen = norms if qk_norm else {}
                op = Op("rope_kv", q=q, k=k, v=v, freqs=freqs, **chosen, out=out, **caches, rope=rope)
                yield scene(ROWS, op, cfg=cfg, kv_type=kv_type)


def _recurrent(target: Target, scene: MakeScene) -> Iterator[Scene]:
    for size in target.ssm_classes:
        ssm = Ssm(n_k_head=2, n_v_head=4, d_state=size, d_conv=4)
        op = Op(
            "ssm",
            qkv=Value("qkv", ssm.channels),
            z=Value("z", ssm.d_inner),
            alpha=Value("alpha", 4),
            beta=Value("beta", 4),
            conv_w=Weight("ssm_conv1d", F32, (ssm.channels, ssm.d_conv)),
            a=Weight("ssm_a", F32, (4,)),
            dt_bias=Weight("ssm_dt", F32, (4,)),
            norm_w=Weight("ssm_norm", F32, (size,)),
            out=Value("ssm", ssm.d_inner),
            **{kind: State(kind, 0) for kind in RECURRENT},
            eps=1e-6,
        )
        for rows in (1, ROWS):
            yield scene(rows, op, cfg=_config(ssm=ssm))


def _scene(
    target: Target,
    rows: int,
    *ops: Op,
    cfg: ModelConfig | None = None,
    kv_type: str = "f16",
    pos: int = POS,
    divide_above: int | None = None,
) -> Scene:
    cfg = cfg or _config()
    target = replace(target, divide_keys_above=divide_above)

    def launches(target: Target) -> tuple[Launch, ...]:
        lowering = Lowering(target, cfg, kv_type)
        return tuple(launch for op in ops for launch in lowering.launches(op, rows))

    def without(kernel: str) -> tuple[Launch, ...]:
        return launches(target.without({kernel}))

    return Scene(target, cfg, kv_type, rows, min(rows, N_TOKENS), pos, launches(target), without)


def _config(
    head_dim: int = 64,
    n_rot: int | None = None,
    n_ctx: int = 128,
    experts: Experts | None = None,
    ssm: Ssm | None = None,
) -> ModelConfig:
    """Make the configuration of a model of one layer, with 4 query heads and 2 key heads."""
    return ModelConfig(
        arch="check",
        n_layer=1,
        n_embd=K,
        n_ff=(K,),
        n_head=4,
        n_head_kv=2,
        head_dim=head_dim,
        n_rot=n_rot or head_dim,
        n_vocab=N_VOCAB,
        n_ctx_train=n_ctx,
        n_ctx=n_ctx,
        norm_eps=1e-6,
        rope=Rope(10000.0),
        recurrent=(ssm is not None,),
        attention_scale=head_dim**-0.5,
        windows=(0,),
        experts=experts,
        ssm=ssm,
    )
