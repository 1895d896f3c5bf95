"""Cases: a small operation for every kernel, with random inputs.

Kernel names, parameters and grids come from the lowering that models use. So a check launches a kernel as a model does.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..config import Experts, Latent, Layer, Mamba2, ModelConfig, Recurrence, Rope, Router, ShortConv, Ssm, Temperature
from ..device.core import Core
from ..gguf.quants import F32, Q8_0, SUPPORTED, QuantType, by_name
from ..gguf.random_weights import random_weights
from ..graph.fuse import GLUS, NORMED, fuse, fuse_glu, fuse_relu2, fuse_route
from ..graph.ops import KEPT, KV_CACHES, LOGITS, Op, Operand, Route, State, Value, Weight
from ..plan import tuning
from ..plan.addresses import Room, kept_type, pages_of, state_sizes
from ..plan.choices import KV_TYPES
from ..plan.chunks import ONE_ROW, StepShape, decode_shape, verify_shape
from ..plan.launch import Launch
from ..plan.lower import Lowering
from ..plan.lower.products import FEW_CLASSES
from ..plan.target import Target
from .inputs import POISON, Bytes
from .step import Run, Step

POS = 70  # of a row: on the second page of the cache
LONG_POS = 299  # long enough for divided attention: several shares of the keys, and the last one is not full
M, K, N_VOCAB, WIDE = (
    71,
    512,
    5000,
    1027,
)  # rows and columns of a matrix, logits: two blocks of every type, and partial tiles


@dataclass(frozen=True)
class Rows:
    """Rows of a scene: the shape of its plan and the runs (first position, rows) of its step."""

    shape: StepShape
    runs: tuple[Run, ...]


ONE = Rows(ONE_ROW, ((POS, 1),))
MOST_STACKED = 8  # rows of the largest class of stacks
#: Single rows, by the rows of their shape: fewer where there can be fewer.
SINGLES = {n: Rows(decode_shape(n), tuple(((POS + 41 * i) % 128, 1) for i in range(n // 2 + 1))) for n in FEW_CLASSES}
FEW = SINGLES[8]
LONG = Rows(decode_shape(2), ((LONG_POS, 1), (POS, 1)))
#: Single rows beside longer runs, one of which begins its sequence: more than a tile of tokens, then padding.
MANY = Rows(StepShape(40, 5, 32, "argmax"), ((POS, 1), (0, 1), (64, 1), (60, 23), (0, 11)))
#: Single rows beside runs with drafts.
VERIFYING = Rows(verify_shape(16), ((POS, 1), (0, 1), (60, 7), (0, 4)))

#: Routers with biases and scales.
ROUTERS = (Router("sigmoid", n_group=11, n_group_used=5), Router("softmax", normalised=False))

#: After the name of a kernel: its case as products of a norm.
OF_NORM = " of a norm"

MakeScene: TypeAlias = "Callable[..., Scene]"  # from the rows and the operations


@dataclass(frozen=True)
class Scene:
    """Launches of some operations, for a step of ``rows``."""

    target: Target
    cfg: ModelConfig
    kv_type: str
    rows: Rows
    launches: tuple[Launch, ...]
    without: Callable[[str], Sequence[Launch]]  # the launches on a device that lacks a kernel

    def memory(self, core: Core, seed: int) -> dict[str, Bytes]:
        """Make the first content of every operand, by name: random inputs, and poison in outputs."""
        rng = np.random.default_rng(seed)
        runs, n_pages = self.rows.runs, pages_of(self.cfg, self.target)
        sizes = state_sizes(self.cfg, self.target, self.kv_type, Room(n_pages * len(runs), len(runs), len(runs)))
        step = Step(core, self.rows.shape, runs, self.cfg.n_vocab, n_pages, rng)
        found: dict[str, Bytes] = {}
        for launch in self.launches:
            for arg in launch.args:
                name = arg.operand.name
                if name not in found:
                    made = self._content(arg.operand, sizes, step, rng)
                    found[name] = made if "r" in arg.mode else np.full_like(made, POISON)
        return found

    def _content(self, operand: Operand, sizes: dict[State, int], step: Step, rng: np.random.Generator) -> Bytes:
        if isinstance(operand, Weight):
            return _weights(operand.type, operand.shape, operand.name, rng)
        shape = self.rows.shape
        if isinstance(operand, Value):
            n = shape.outs if operand.outs else shape.rows
            return _bytes(rng.standard_normal(n * operand.width, np.float32))
        if operand.kind in step.contents:
            return step.whole(operand.kind, sizes[operand])
        if operand == LOGITS:
            return _bytes(_logits(shape.outs, self.cfg.n_vocab, rng))
        paged = {**dict.fromkeys(KV_CACHES, by_name(self.kv_type)), KEPT.kind: kept_type(self.kv_type)}
        cache = paged.get(operand.kind, F32)
        return _weights(cache, (sizes[operand] // cache.block_bytes * cache.block_size,), operand.kind, rng)


@dataclass(frozen=True)
class Case:
    """Kernel in a scene. The launches before it write its inputs.

    ``place`` is the number of the splits and of the scene among all scenes, which are the same for every core.
    """

    scene: Scene
    index: int
    place: tuple[int, int]

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


def cases(core: Core, backend: str = "", cooperative: bool = False) -> dict[str, Case]:
    """Make a case for every kernel that a plan can launch, by name. Row counts of ``backend`` come first.

    ``cooperative``: also for those of Metal 4's tensor operations. A kernel that can compute the norm of its
    activations has a second case, by its name and OF_NORM.
    """
    found: dict[str, Case] = {}
    for place, scene in scenes(core, backend, cooperative=cooperative).items():
        for i, launch in enumerate(scene.launches):
            of_norm = launch.op.kind in NORMED and launch.op.get("norm") is not None
            found.setdefault(launch.kernel + OF_NORM * of_norm, Case(scene, i, place))
    return found


def scenes(
    core: Core, backend: str = "", like: Core | None = None, cooperative: bool = False
) -> dict[tuple[int, int], Scene]:
    """Make all scenes, by their places. A core has its own kernels and tiles for the operations of a scene.

    Norms and choices are folded as on the core ``like``, by default the same one.
    """
    folds = {name: n for name, n in (like or core).shapes().items() if name.startswith("FOLDED_")}
    target = Target.of_kernels(core)
    target = replace(target, shapes={**target.shapes, **folds})
    targets = list[Target]()
    for splits in (tuning.SPLITS.get(backend, {}), {}, *tuning.SPLITS.values()):
        if all(splits != other.splits for other in targets):
            targets.append(replace(target, splits=splits))
    if cooperative:
        targets.append(replace(target, cooperative=True))
    return {(i, n): scene for i, of in enumerate(targets) for n, scene in enumerate(_scenes(of))}


def has_cooperative(kernels: Iterable[str]) -> bool:
    """Return True if there are kernels of Metal 4's tensor operations."""
    return any("_mm_coop" in kernel for kernel in kernels)


def reference_case(case: Case, of: Mapping[tuple[int, int], Scene]) -> Case:
    """Return the case of another core's scenes that computes the same: its kernel may have another name."""
    return Case(of[case.place], case.index, case.place)


def _weights(qtype: QuantType, shape: Sequence[int], name: str, rng: np.random.Generator) -> Bytes:
    """Make random weights of root mean square 1/8, or 1 for f32."""
    if name == "rope_freqs":
        return _bytes(rng.random(shape, np.float32))
    if name == "ssm_a":  # the rate of a decay
        return _bytes(-np.abs(rng.standard_normal(shape, np.float32)))
    return _bytes(random_weights(qtype, shape, rng, size=1.0 if qtype is F32 else 1 / 8))


def _logits(outs: int, n: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """Make logits with two large ones for each output.

    The native kernel divides logits into halves, the Metal text into every other 256. These two lie in the first and
    in the second share of both.
    """
    logits = rng.standard_normal((outs, n), np.float32)
    outputs, large = np.arange(outs), rng.permuted(np.tile(np.array([8, 9], np.float32), (outs, 1)), axis=1)
    logits[outputs, rng.integers(512, 768, outs)] = large[:, 0]
    logits[outputs, rng.integers(3840, 4096, outs)] = large[:, 1]
    return logits


def _bytes(values: NDArray[np.generic]) -> Bytes:
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8)


# ---- operations of every family -----------------------------------------------------------------------------


def _scenes(target: Target) -> Iterator[Scene]:
    scene = partial(_scene, target)
    yield from _choices(scene)
    for qtype in SUPPORTED:
        yield from _products(target, scene, qtype)
        yield from _products_of_norm(target, scene, qtype) if target.fusible.norms else ()
        if qtype.name in target.expert_types:
            yield from _mixtures(target, scene, qtype)
    yield from _rows_of_values(target, scene)
    yield from _caches(target, scene)
    yield from _latent(target, scene)
    yield from _recurrent(target, scene)
    yield scene(MANY, Op("cap_logits", scale=0.5, cap=4.0))
    yield from (scene(MANY, Op(kind)) for kind in ("begin", "argmax", "draw"))
    yield scene(VERIFYING, Op("accept"))


def _products(target: Target, make: MakeScene, qtype: QuantType) -> Iterator[Scene]:
    w, up, small = Weight("w", qtype, (M, K)), Weight("up", qtype, (M, K)), Weight("small", F32, (3, K))
    limits = target.fusible
    x, y, residual, scale = Value("x", K), Value("y", M), Value("residual", M), Value("scale", 3)
    product, product_up = (Op("linear", weight=of, x=x, out=Value(f"{of.name}.out", M)) for of in (w, up))
    yield make(MANY, Op("embed", table=Weight("table", qtype, (N_VOCAB, K)), out=x, scale=1.5))
    for rows in (ONE, MANY, *SINGLES.values()):
        other = [n for n in FEW_CLASSES if n != rows.shape.rows]
        few = [f"mul_few{gated}_{qtype.name}_n{n}" for n in other for gated in ("", "_gated")]
        scene = partial(make, missing=few if rows.shape.rows in SINGLES else ())
        yield scene(rows, Op("linear", weight=w, x=x, out=y))
        yield scene(rows, *fuse([product, Op("add", a=residual, b=product.out, out=y)], rows.shape.rows, limits))
        shared = Op("add_shared", weights=scale, y=product.out, residual=residual, out=y)
        yield scene(rows, *fuse([product, shared], rows.shape.rows, limits))
        for glu in ("swiglu", "geglu"):
            gated = [product, product_up, Op(glu, gate=product.out, up=product_up.out, out=y)]
            yield scene(rows, *fuse_glu(gated, limits))
        yield from _wide_products(target, partial(scene, rows), qtype, few) if rows.shape.rows in SINGLES else ()
    heads = Op("linear_heads", weight=Weight("heads", qtype, (2, M, K)), x=Value("x2", 2 * K), out=Value("y2", 2 * M))
    yield from (make(rows, heads) for rows in (FEW, MANY))
    plain = Op("linear", weight=Weight("plain", qtype, (M + 4, K)), x=x, out=Value("plain.out", M + 4))
    few_rows = Op("linear", weight=small, x=x, out=Value("small.out", 3))
    pair = Op("swiglu", gate=product.out, up=product_up.out, out=y)
    stacked = limits._replace(stack_rows=MOST_STACKED)
    for rows in (ONE, *(of for n, of in SINGLES.items() if n <= MOST_STACKED)):
        yield make(rows, *fuse([plain, few_rows, product, product_up, pair], rows.shape.rows, stacked))


def _products_of_norm(target: Target, make: MakeScene, qtype: QuantType) -> Iterator[Scene]:
    """Make products of one row that compute the norm of their activations."""
    norm, y = _norm(), Value("y", M)
    weights = [Weight(name, qtype, (m, K)) for name, m in (("w", M), ("up", M), ("plain", M + 4))]
    weights.append(Weight("small", F32, (3, K)))
    w, up, plain, small = (
        Op("linear", weight=of, x=norm.out, out=Value(f"{of.name}.out", of.shape[0])) for of in weights
    )
    swiglu, geglu = (Op(glu, gate=w.out, up=up.out, out=y) for glu in ("swiglu", "geglu"))
    add = Op("add", a=Value("residual", M), b=w.out, out=y)
    for ops in ([w], [w, add], [w, up, swiglu], [w, up, geglu], [plain, small, w, up, swiglu]):
        yield make(ONE, *fuse([norm, *ops], 1, target.fusible))


def _norm() -> Op:
    """Make the norm of K activations."""
    return Op("rms_norm", x=Value("x", K), weight=Weight("norm", F32, (K,)), out=Value("normed", K), eps=1e-6)


def _wide_products(target: Target, make: MakeScene, qtype: QuantType, missing: Sequence[str]) -> Iterator[Scene]:
    """Make products of a wide matrix, by kernels that smaller ones do not meet: as if those for small ones lacked."""
    wide, up = (Weight(name, qtype, (WIDE, K)) for name in ("wide", "wide_up"))
    x, out = Value("x", K), Value("wide.out", WIDE)
    small = target.shapes["FEW_SMALL_ROWS"]
    lacking = [f"mul_few{gated}_{qtype.name}_n{n}_r{small}" for n in FEW_CLASSES for gated in ("", "_gated")]
    for scene in (partial(make, missing=[*missing, *lacking]), partial(make, missing=missing)):
        yield scene(Op("linear", weight=wide, x=x, out=out))
        yield scene(Op("linear_swiglu", gate=wide, up=up, x=x, out=out))


def _choice(n: int, n_used: int, router: Router | None = None) -> tuple[Route, Op]:
    """Make a routing among ``n`` experts, and the operation that computes it. A given router has biases and scales."""
    route = Route(
        Value("expert_ids", n_used),
        Value("expert_weights", n_used + 1),
        Value("expert_slots", n_used),
        Value("expert_tiles", 4 * n_used),
        Value("expert_n_tiles", 1),
    )
    operands: dict[str, Operand] = {"router": Value("router", n), "shared": Value("shared", 1)}
    if router:
        operands |= {name: Weight(name, F32, (n,)) for name in ("router_bias", "router_scales")}
    op = Op("route", **operands, **route._asdict(), **asdict(router or Router()), whole_shared=False)
    return route, op


def _choices(scene: MakeScene) -> Iterator[Scene]:
    """Choose for few rows and for many, by scores of two kinds, among one block of experts and among several."""
    for rows, n, router in ((FEW, 253, ROUTERS[0]), (MANY, 1021, ROUTERS[1])):
        yield scene(rows, _choice(n, 8, router)[1], cfg=_config(experts=Experts(n, 8, K, K)))


def _mixtures(target: Target, scene: MakeScene, qtype: QuantType) -> Iterator[Scene]:
    """Make products of experts.

    Types take turns: one has biases and the next has none, each has another gate and another router, and the kernels of
    one row choose their experts or find them chosen.
    """
    n, n_used, limits, turn = 8, 3, target.fusible, SUPPORTED.index(qtype)
    cfg = _config(experts=Experts(n, n_used, K, K))
    router = (None, Router("sigmoid", n_group=4, n_group_used=2), Router("softmax", normalised=False))[turn % 3]
    route, choose = _choice(n, n_used, router)
    w, up = (Weight(name, qtype, (n, M, K)) for name in ("w", "up"))
    biases = [None if turn % 2 else Weight(f"{of.name}.bias", F32, (n, M)) for of in (w, up)]
    x, residual, out = Value("x", K), Value("residual", M), Value("out", M)
    each_x, each_y = Value("each_x", n_used * K), Value("each_y", n_used * M)
    routed, outs = route._asdict(), (Value(f"{of.name}.out", n_used * M) for of in (w, up))
    first, second = (
        Op("experts", **routed, weight=of, bias=bias, x=x, out=to)
        for of, bias, to in zip((w, up), biases, outs, strict=True)
    )
    gate = Op(GLUS[turn % len(GLUS)], gate=first.out, up=second.out, out=each_y)
    squared = Op("relu2", x=first.out, out=each_y)
    for rows in (ONE, FEW, MANY):
        plain, gated = ([first] if turn % 3 else fuse_relu2([first, squared], limits)), [first, second, gate]
        for ops in ([choose, *plain], [choose, *fuse_glu(gated, limits)]):
            chooses = limits.choice and rows is ONE and turn // 2 % 2 == 0
            yield scene(rows, *(fuse_route(ops, limits) if chooses else ops), cfg=cfg)
    norm = _norm()
    first, second = (experts.replace(x=norm.out) for experts in (first, second))
    for products in ([first], [first, second, gate]):
        yield scene(ONE, choose, *fuse([norm, *products], 1, limits), cfg=cfg)
    mix = Op("mix", weights=route.weights, y=each_y, residual=residual, out=out)
    for rows in (FEW, MANY):
        yield scene(rows, choose, mix, cfg=cfg)
    down = Op("experts", **routed, weight=w, bias=biases[0], x=each_x, out=each_y)
    yield scene(ONE, choose, *fuse([down, mix], 1, limits), cfg=cfg)
    for shared in dict.fromkeys((qtype, qtype if qtype.block_size == 1 else Q8_0)):
        product = Op("linear", weight=Weight("w_shared", shared, (M, K)), x=x, out=Value("shared.out", M))
        added = Op("add_shared", weights=route.weights, y=product.out, residual=residual, out=Value("added", M))
        mixed = mix.replace(residual=added.out)
        yield scene(ONE, choose, *fuse([product, added, down, mixed], 1, limits), cfg=cfg)


def _rows_of_values(target: Target, scene: MakeScene) -> Iterator[Scene]:
    n = 1500  # more than a threadgroup's columns
    x, other, y, outs = Value("x", n), Value("other", n), Value("y", n), Value("outs", n, outs=True)
    norms = [Weight(name, F32, (n,)) for name in ("norm", "next_norm")]
    norm = Op("rms_norm", x=x, weight=norms[0], out=Value("norm.out", n), eps=1e-6)
    add = Op("add", a=other, b=norm.out, out=y)
    following = Op("rms_norm", x=y, weight=norms[1], out=Value("normed", n), eps=1e-6)
    scaled = Op("scale", x=y, factor=Weight("factor", F32, (1,)), out=Value("scaled", n))
    for ops in ([norm], [norm, add], [norm, add, following], [scaled]):
        yield scene(MANY, *fuse(ops, MANY.shape.rows, target.fusible))
    yield scene(MANY, Op("add", a=x, b=other, out=y))
    for kind in GLUS:
        yield scene(MANY, Op(kind, gate=x, up=other, out=y))
    yield scene(MANY, Op("relu2", x=x, out=y))
    yield scene(MANY, Op("geglu_slice", gate=x, up=Value("wide", 3 * n), out=y, first=n))
    yield scene(MANY, Op("take_rows", x=x, out=outs))


def _caches(target: Target, scene: MakeScene) -> Iterator[Scene]:
    caches = {kind: State(kind, 0) for kind in KV_CACHES}
    for kv_type in KV_TYPES:
        for head_dim in target.head_classes:
            cfg = _config(head_dim=head_dim)
            q, gated, out = Value("q", 4 * head_dim), Value("gated", 8 * head_dim), Value("out", 4 * head_dim)
            operands: dict[str, Operand] = {"q": q, **caches, "gate": gated, "out": out}
            if kv_type == "f16":
                operands["sinks"] = Weight("sinks", F32, (4,))
            attend = Op("attention", **operands, scale=head_dim**-0.5, window=0, layer=0)
            yield scene(MANY, attend, cfg=cfg, kv_type=kv_type)
            yield scene(MANY, attend, cfg=cfg, kv_type=kv_type, exact=True)
            long, gate = _config(head_dim=head_dim, n_ctx=1024), Value("gate", 4 * head_dim)
            yield scene(LONG, attend.replace(gate=gate), cfg=long, kv_type=kv_type, divide_above=LONG_POS)
        cfg = _config(head_dim=64, n_rot=48, temperature=Temperature(0.1, 32))
        k, v, out = Value("k", 2 * 64), Value("v", 2 * 64), Value("q_out", 4 * 64)
        freqs = Weight("rope_freqs", F32, (24,))
        norms = {name: Weight(name, F32, (64,)) for name in ("q_norm", "k_norm")}
        for rope in ("norm", "neox"):
            for qk_norm in (False, True):
                q = Value("q", (8 if qk_norm else 4) * 64)  # with gates, as the models that have these norms
                chosen = norms if qk_norm else {}
                sizes = {"rope": rope, "layer": 0}
                op = Op("rope_kv", q=q, k=k, v=v, freqs=freqs, **chosen, out=out, **caches, v_norm=qk_norm, **sizes)
                q_norm = {name: norm for name, norm in chosen.items() if name == "q_norm"}
                alone = Op("rope", q=q, freqs=freqs, **q_norm, out=Value("q_alone", 4 * 64), **sizes)
                stored = Op("store_kv", **op.but("q", "q_norm", "out"))
                yield scene(MANY, op, alone, stored, cfg=cfg, kv_type=kv_type)
    for kv_type in ("f32", "f16"):
        row, cfg = Value("row", K), replace(_config(), drafts=True)
        pairs = Op("pair_rows", x=Value("x", K), out=Value("pairs", 2 * K))
        yield scene(MANY, Op("keep_rows", x=row), pairs, cfg=cfg, kv_type=kv_type)
    head, attends = Value("q", 4 * 64), {"scale": 0.125, "window": 9, "layer": 0}
    both_ways = Op("attention", q=head, **caches, out=replace(head, name="out"), **attends)
    yield scene(MANY, both_ways, cfg=replace(_config(head_dim=64), causal=False))


def _latent(target: Target, scene: MakeScene) -> Iterator[Scene]:
    n_rot, n_still, n_head = target.shapes["LATENT_MAX_ROT"], 96, 4
    for kv_type in KV_TYPES:
        for n_latent in target.latent_classes:
            sizes = Layer(
                n_head=n_head,
                n_head_kv=1,
                head_dim=n_latent + n_rot,
                n_rot=n_rot,
                rope=Rope(10000.0),
                latent=Latent(n_latent, n_still, n_still, 0, 0.1),
            )
            cache, rot = State("k_cache", 0), Value("q_rot", n_head * n_rot)
            q, out = Value("q", n_head * n_latent), Value("out", n_head * n_latent)
            attend = Op("attention_latent", q=q, q_rot=rot, k_cache=cache, out=out, scale=0.1, layer=0)
            cfg = replace(_config(n_ctx=1024), layers=(sizes,))
            yield scene(MANY, attend, cfg=cfg, kv_type=kv_type)
            yield scene(LONG, attend, cfg=cfg, kv_type=kv_type, divide_above=LONG_POS)
        divide = Op(
            "rope_latent",
            q=Value("q_both", n_head * (n_still + n_rot)),
            kv=Value("kv", n_latent + n_rot),
            norm=Weight("latent_norm", F32, (n_latent,)),
            freqs=Weight("rope_freqs", F32, (n_rot // 2,)),
            still=Value("q_still", n_head * n_still),
            rot=rot,
            k_cache=cache,
            layer=0,
        )
        yield scene(MANY, divide, cfg=cfg, kv_type=kv_type)


def _recurrent(target: Target, scene: MakeScene) -> Iterator[Scene]:
    for size in target.ssm_classes:
        yield from _mamba2(scene, Mamba2(n_head=4, n_group=2, d_head=48, d_state=size, d_conv=4))
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
            **{kind: State(kind, 0) for kind in ssm.slot_floats},
            repeat=1,
            eps=1e-6,
        )
        for rows in (ONE, FEW, MANY):
            yield scene(rows, op, cfg=_config(recurrence=ssm))
        x, parts = (
            Value("x", ssm.channels + ssm.d_inner),
            {"qkv": Value("qkv", ssm.channels), "z": Value("z", ssm.d_inner)},
        )
        yield scene(MANY, Op("ssm_ungroup", x=x, **parts), cfg=_config(recurrence=ssm))
    conv = ShortConv(channels=200, taps=3)
    state = {kind: State(kind, 0) for kind in conv.slot_floats}
    weight, bcx = Weight("conv", F32, (conv.channels, conv.taps)), Value("bcx", 3 * conv.channels)
    op = Op("short_conv", bcx=bcx, conv_w=weight, **state, out=Value("conv.out", conv.channels))
    yield scene(MANY, op, cfg=_config(recurrence=conv))


def _mamba2(scene: MakeScene, sizes: Mamba2) -> Iterator[Scene]:
    n_head, n_group, channels = sizes.n_head, sizes.n_group, sizes.channels
    op = Op(
        "mamba2",
        inputs=Value("inputs", sizes.d_in),
        conv_w=Weight("ssm_conv1d", F32, (channels, sizes.d_conv)),
        conv_b=Weight("ssm_conv1d.bias", F32, (channels,)),
        a=Weight("ssm_a", F32, (n_head, 1)),
        d=Weight("ssm_d", F32, (n_head, 1)),
        dt_bias=Weight("ssm_dt", F32, (n_head,)),
        norm_w=Weight("ssm_norm", F32, (n_group, sizes.d_inner // n_group)),
        out=Value("mamba2", sizes.d_inner),
        **{kind: State(kind, 0) for kind in sizes.slot_floats},
        eps=1e-6,
    )
    for rows in (ONE, FEW, MANY):
        yield scene(rows, op, cfg=_config(recurrence=sizes))


def _scene(
    target: Target,
    rows: Rows,
    *ops: Op,
    cfg: ModelConfig | None = None,
    kv_type: str = "f16",
    divide_above: int | None = None,
    missing: Sequence[str] = (),
    exact: bool = False,
) -> Scene:
    """Make a scene, of kernels that a device launches which lacks the ``missing`` ones."""
    cfg = cfg or _config()
    target = replace(target, divide_keys_above=divide_above, exact=exact)

    def launches(target: Target) -> tuple[Launch, ...]:
        lowering = Lowering(target, cfg, kv_type, rows.shape)
        return tuple(launch for op in ops for launch in lowering.launches(op))

    def without(kernel: str) -> tuple[Launch, ...]:
        return launches(target.without({kernel, *missing}))

    usual = tuple(replace(launch, replaces=()) for launch in launches(target.without(missing)))
    return Scene(target, cfg, kv_type, rows, usual, without)


def _config(
    head_dim: int = 64,
    n_rot: int | None = None,
    n_ctx: int = 128,
    experts: Experts | None = None,
    recurrence: Recurrence | None = None,
    temperature: Temperature | None = None,
) -> ModelConfig:
    """Make the configuration of a model of one layer, with 4 query heads and 2 key heads."""
    attends = Layer(n_head=4, n_head_kv=2, head_dim=head_dim, n_rot=n_rot or head_dim, rope=Rope(10000.0), n_ff=K)
    return ModelConfig(
        arch="check",
        n_embd=K,
        n_vocab=N_VOCAB,
        n_ctx_train=n_ctx,
        n_ctx=n_ctx,
        norm_eps=1e-6,
        layers=(Layer("recurrent") if recurrence else attends,),
        attention_scale=head_dim**-0.5,
        temperature=temperature,
        experts=experts,
        recurrence=recurrence,
    )
