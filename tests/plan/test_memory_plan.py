"""Memory estimates and the bytes of a token: the figures before loading, and that loading keeps to them."""

from __future__ import annotations

import json
import re
import secrets
import tracemalloc
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

import synthetic
import zincmetal
from support.paths import DATA
from support.steps_lab import StepsLab
from zincmetal import gguf
from zincmetal.cli import plan as report
from zincmetal.device import backend
from zincmetal.engine import engine, loaded
from zincmetal.errors import DeviceError, OutOfMemoryError, UsageError
from zincmetal.plan import addresses
from zincmetal.plan.addresses import UPLOAD_BYTES, Room
from zincmetal.plan.chunks import ONE_ROW, PROMPT_ROWS, SEATS, chunk_shape, decode_shape, rows_for
from zincmetal.plan.estimate import MemoryEstimate
from zincmetal.plan.planner import Planner
from zincmetal.plan.target import Target
from zincmetal.settings import MEMORY_LIMIT

PATH, HYBRID = DATA / "qwen3-q8_0.gguf", DATA / "qwen35moe-q4k-q5k-q8.gguf"
SEED = secrets.randbits(32)


@pytest.fixture(scope="module")
def device():
    core, opened = backend.open_device("cpu")
    return core, opened.info


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Writes the 35B-A3B file at full size without its weights: a header, then a hole."""
    path = tmp_path_factory.mktemp("whole") / "whole.gguf"
    synthetic.write(path, synthetic.Sizes(), empty=True)
    with gguf.open(path) as file:
        yield file


def planner(file, device, **options):
    return Planner(file, Target.of(*device), **options)


# ---- memory -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv", ["f32", "f16", "q8_0"])
def test_a_model_in_memory_takes_what_was_planned(kv):
    """One sequence of the whole context, with the largest plans of every output."""
    lab = StepsLab(PATH, kv=kv, context=1000)
    plan = lab.planner.memory()
    room = Room(-(-1000 // 64), 0, SEATS)
    for name, nbytes in lab.planner.addresses.sizes(room).items():
        lab.buffers.alloc(name, nbytes)
    lab.planner.resize(room)
    for output in ("argmax", "draw", "all"):
        for shape in (
            ONE_ROW,
            decode_shape(32, output),
            chunk_shape(512, 32, 32, output),
            chunk_shape(512, 0, 64, output),
        ):
            lab.programs.get(shape, 0)
    sizes = lab.buffers.sizes()
    allocated = sum(n for name, n in sizes.items() if not name.startswith("weights."))
    mapped = sum(n for name, n in sizes.items() if name.startswith("weights."))
    spare = plan.arena_of(1000) - sizes["arena"]  # the estimate is of 64 outputs, whose draws need a little more
    assert 0 <= spare <= 0.01 * plan.arena_of(1000)
    assert allocated + spare == plan.total - sum(plan.weights.values())
    slack = 32 * len(lab.file.tensors) + 2 * lab.device.info["page_bytes"]  # alignment; whole pages
    assert 0 <= mapped - sum(plan.weights.values()) < slack
    lab.close()


def test_sizes_of_the_full_model(whole, device):
    """The sizes follow from the geometry. llama.cpp reports the same: 42.50 MiB of q8_0 K/V for 4096 tokens."""
    plan = planner(whole, device, context=4096, kv="q8_0").memory()
    assert plan.kv - 4 * 4096 == 42.5 * 2**20  # the pool has the ids of its tokens beside
    assert plan.slot == 30 * 4 * (32 * 128 * 128 + 4 * 8192)
    assert plan.tables == (4 * SEATS + 4 * 8) * 4096 // 64  # entries of all tables, and four descriptions of writes
    assert plan.logits == 64 * 4 * 248320
    assert sum(plan.weights.values()) == pytest.approx(22.13e9, rel=1e-3)
    per_token = {kv: planner(whole, device, context=64, kv=kv).memory().kv - 4 * 64 for kv in ("f32", "f16")}
    assert per_token == {"f32": 64 * 10 * 2 * 2 * 256 * 4, "f16": 64 * 10 * 2 * 2 * 256 * 2}


def test_dispatches_of_a_token_of_the_full_model(whole, device):
    """6 for a recurrent layer, 7 for one with attention (llama.cpp: 38 and 33), and 5 outside layers."""
    plan = planner(whole, device).plan()
    assert len(plan.dispatches) == 30 * 6 + 10 * 7 + 5 <= 304
    assert not any(d.launch.routed for d in plan.dispatches)


def test_a_model_that_does_not_fit_is_refused_before_anything_is_allocated(monkeypatch, device):
    with gguf.open(PATH) as file:
        plan = planner(file, device, context=1024).memory()
    monkeypatch.setenv(MEMORY_LIMIT.name, str(plan.total - 1))
    with monkeypatch.context() as patch:
        patch.setattr(engine, "Buffers", lambda *_: pytest.fail("memory was asked for"))
        with pytest.raises(OutOfMemoryError, match=r"context of 1024 tokens .* weights .* K/V .* arena") as refused:
            zincmetal.load(PATH, device="cpu", context=1024)
    largest = int(re.search(r"the largest context that fits is (\d+)", str(refused.value))[1])
    assert 512 < largest < 1024
    zincmetal.load(PATH, device="cpu", context=largest).close()
    with pytest.raises(OutOfMemoryError, match=f"that fits is {largest}"):
        zincmetal.load(PATH, device="cpu", context=largest + 1)
    monkeypatch.setenv(MEMORY_LIMIT.name, "1000")
    with pytest.raises(OutOfMemoryError, match="no context fits"):
        zincmetal.load(PATH, device="cpu")


def test_refusing_a_huge_context_costs_no_memory(whole):
    tracemalloc.start()
    try:
        with pytest.raises(OutOfMemoryError, match=f"context of {2**31 - 1} tokens"):
            zincmetal.load(whole.path, device="cpu", context=2**31 - 1)
        assert tracemalloc.get_traced_memory()[1] < 50e6  # most of it the header
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("limit", ["-1", "lots", "1e9", "0x10", "٣"])
def test_a_limit_that_is_no_number_of_bytes(limit, monkeypatch):
    monkeypatch.setenv(MEMORY_LIMIT.name, limit)
    with pytest.raises(UsageError, match=MEMORY_LIMIT.name):
        zincmetal.load(PATH, device="cpu")


def test_the_largest_context_is_the_largest():
    rng = np.random.default_rng(SEED)
    found = Counter()
    for _ in range(300):
        fixed, kv_page, budget, n_ctx, trained = (int(rng.integers(1, 2**b)) for b in (20, 16, 22, 14, 14))
        arena = dict(zip(PROMPT_ROWS, np.sort(rng.integers(0, 2**20, 4)).tolist(), strict=True))
        plan = MemoryEstimate(n_ctx, trained, budget, {"f32": fixed}, 64, kv_page, kv_page // 8, 0, arena, 0, 0)
        best, limit = plan.largest_context, max(n_ctx, trained)
        found["none" if best == 0 else "all" if best == limit else "some"] += 1
        assert best == 0 or replace(plan, n_ctx=best).total <= budget, SEED
        assert best == limit or replace(plan, n_ctx=best + 1).total > budget, SEED
    assert len(found) == 3, (found, SEED)


def test_the_example_of_the_largest_context():
    """The numbers of its docstring."""
    plan = MemoryEstimate(
        n_ctx=4096,
        n_ctx_train=10**6,
        budget=10 * 10**9,
        weights={"q4_k": 6 * 10**9},
        page=64,
        kv_page=2 * 10**6,
        table_page=0,
        slot=0,
        arena={1: 10**6, 512: 100 * 10**6},
        logits=0,
        other=0,
    )
    assert plan.largest_context == 124_800


def test_an_estimate_is_shown_in_a_line_and_as_a_bar():
    plan = MemoryEstimate(64, 64, 1000, {"f32": 500}, 64, 250, 10, 0, {1: 50}, 90, 50)
    assert repr(plan) == "<MemoryEstimate: 950 bytes of 1 kB for a context of 64>"
    shown = plan._repr_html_()
    assert re.findall(r"width:([\d.]+)%", shown) == ["50.00", "25.00", "5.00", "15.00"]
    assert "recurrent state" not in shown
    assert "more than the budget" not in shown
    over = replace(plan, budget=900)._repr_html_()
    assert "more than the budget" in over
    assert sum(map(float, re.findall(r"width:([\d.]+)%", over))) == pytest.approx(100, abs=0.1)


def test_a_small_context_that_is_refused_does_not_promise_a_larger_one(monkeypatch, device):
    """A context of 20 needs no plan of 512 rows. The bytes saved so are no room for more positions."""
    with gguf.open(PATH) as file:
        plan = planner(file, device, context=20).memory()
    monkeypatch.setenv(MEMORY_LIMIT.name, str(plan.total - 1))
    with pytest.raises(OutOfMemoryError, match="that fits is") as refused:
        zincmetal.load(PATH, device="cpu", context=20)
    largest = int(re.search(r"that fits is (\d+)", str(refused.value))[1])
    assert largest < 20
    zincmetal.load(PATH, device="cpu", context=largest).close()
    monkeypatch.setenv(MEMORY_LIMIT.name, str(plan.total))
    with pytest.raises(OutOfMemoryError, match="that fits is") as refused:
        zincmetal.load(PATH, device="cpu", context=1000)
    largest = int(re.search(r"that fits is (\d+)", str(refused.value))[1])
    assert 20 <= largest < 1000
    zincmetal.load(PATH, device="cpu", context=largest).close()
    with pytest.raises(OutOfMemoryError, match="that fits is"):
        zincmetal.load(PATH, device="cpu", context=largest + 1)


def test_tokens_of_all_sequences():
    plan = MemoryEstimate(100, 1000, 5000, {"f32": 1000}, 64, 100, 5, 50, {1: 1, 32: 2, 128: 3}, 1, 1)
    assert plan.total == 1000 + 50 + 3 + 2 + 2 * 105
    assert plan.most_tokens == 100 + (5000 - plan.total) // 100 * 64
    assert replace(plan, budget=plan.total).most_tokens == 100
    assert replace(plan, budget=plan.total - 1).most_tokens == 0


# ---- pools ------------------------------------------------------------------------------------------------------


def room_on(path, device, context, budget_of=lambda total: total, sequences=1, **info):
    """The planner of a file on a device that grants ``budget_of(total)`` bytes, and its first and largest rooms."""
    core, known = device
    with gguf.open(path) as file:
        total = planner(file, device, context=context).memory().total
        target = Target.of(core, {**known, "allocated_bytes": 0, "working_set_bytes": budget_of(total), **info})
        made = Planner(file, target, context)
        return made, made.first_room(), made.most_room(sequences)


@pytest.mark.parametrize("path", [PATH, HYBRID], ids=["attention", "hybrid"])
@pytest.mark.parametrize("context", [40, 1000, 100_000])
def test_a_budget_for_one_sequence_has_room_for_it_alone(path, device, context):
    made, first, most = room_on(path, device, context)
    made.check_memory()
    assert most == Room(-(-context // 64), int(path == HYBRID), SEATS)
    assert first.pages == min(4096 // 64 + 1, most.pages)
    assert first.slots == most.slots
    assert made.max_rows == rows_for(context)


def test_pools_take_what_the_budget_leaves(device):
    """Half of it for checkpoints of states, the rest for pages."""
    spare = 10 * 10**6
    made, first, most = room_on(HYBRID, device, 600, lambda total: total + spare, 100)
    assert first == Room(11, 4, SEATS)
    assert (made.max_rows, most.seats) == (512, 100)
    assert (most.slots - 1) * made.slot_bytes <= spare / 2 < most.slots * made.slot_bytes
    used = (most.slots - 1) * made.slot_bytes + (most.pages - 10) * made.page_bytes
    assert 0 <= spare - used < made.page_bytes


def test_a_pool_is_within_a_buffer_and_within_32_bits(device):
    made, _, most = room_on(PATH, device, 40, lambda total: 10**13)
    largest = max(n for state, n in made.addresses.states.items() if state.kind in ("k_cache", "history"))
    each = largest // made.addresses.room.pages
    assert most.pages * each < 2**32 <= (most.pages + 1) * each
    made, _, most = room_on(PATH, device, 40, lambda total: 10**13, max_buffer_bytes=10**7)
    assert most.pages == 10**7 // each


def test_steps_have_more_rows_where_memory_allows(device):
    """2,048 on a GPU whose memory is eight times their arena; never on the CPU."""
    for backend_name, most in (("cuda", 2048), ("cpu", 512)):
        made, *_ = room_on(PATH, device, 4000, lambda total: 10**12, backend=backend_name)
        assert made.max_rows == most
    arena = made.memory((512,)).arena[512] * 4
    for share, rows in ((1.1, 2048), (0.9, 512)):
        made, *_ = room_on(PATH, device, 4000, lambda total, s=share: total + int(8 * s * arena), backend="cuda")
        assert made.max_rows == rows


def test_a_context_of_millions_costs_nothing_until_it_is_used(device):
    made, first, _ = room_on(PATH, device, 2**20, lambda total: 10**12)
    assert first.pages == 65
    own = sum(made.addresses.sizes(first).values())
    assert own < 20e6 < made.memory().kv


def test_another_room_makes_other_plans(device):
    with gguf.open(PATH) as file:
        made = planner(file, device, context=256)
        small, before = made.plan(), made.addresses.room
        made.resize(Room(50, 0, SEATS))
        large = made.plan()
        made.resize(before)
        assert made.plan() == small != large
    regions = [{r.buffer: r.nbytes for d in plan.dispatches for r in d.regions} for plan in (small, large)]
    grown = {name for name in regions[0] if regions[0][name] != regions[1][name]}
    assert grown == {"history", *(f"{kind}.{i}" for kind in ("k_cache", "v_cache") for i in range(made.config.n_layer))}
    assert {regions[1][name] * before.pages / regions[0][name] for name in grown} == {50.0}


# ---- the file as buffers ------------------------------------------------------------------------------------------


def addresses_on(file, device, **info):
    core, known = device
    return Planner(file, Target.of(core, {**known, **info}), 64).addresses


@pytest.mark.parametrize("limit", [UPLOAD_BYTES, 100_000])
def test_weights_that_are_copied_go_in_pieces(device, monkeypatch, limit):
    """No piece exceeds the limit, unless one tensor does. Every tensor lies in one piece."""
    monkeypatch.setattr(addresses, "UPLOAD_BYTES", limit)
    with gguf.open(PATH) as file:
        own_memory = addresses_on(file, device, unified_memory=False)
        sizes = [t.nbytes for t in file.tensors.values()]
        assert len(own_memory.maps) == 1 if limit == UPLOAD_BYTES else len(own_memory.maps) > 5
        assert max(sizes) > 100_000 > min(sizes)
        for m in own_memory.maps:
            inside = [
                t for t in file.tensors.values() if own_memory.place(own_memory.weight(t.name)).buffer == m.buffer
            ]
            assert m.nbytes <= limit or len(inside) == 1
            for t in inside:
                region = own_memory.place(own_memory.weight(t.name))
                assert m.start + region.offset == t.offset
                assert region.offset + region.nbytes <= m.nbytes
            assert m.start % device[1]["page_bytes"] == 0
        assert len(addresses_on(file, device, unified_memory=True).maps) == 1


@pytest.mark.parametrize("name", ["gemma3-q4_0", "qwen2-q8_0"])
def test_a_table_of_tokens_larger_than_the_largest_buffer_is_bound_in_windows(name, monkeypatch):
    """For a model with one table for both ends, and for one with two, the results stay the same."""
    path, ids = DATA / f"{name}.gguf", list(range(3, 40))
    with zincmetal.load(path, device="cpu", context=64) as model:
        expected = (
            model.logits(ids),
            model.generate(ids, 6).tokens,
            model.generate(ids, 6, temperature=1, seed=3).tokens,
        )
        tables = [t for t in model.file.tensors.values() if t.name in addresses.WINDOWED]
        largest = min(t.nbytes for t in tables) // 3 + 2 * model.device.info["page_bytes"]

    def with_small_buffers(file, target, *rest):
        return Planner(file, replace(target, max_buffer_bytes=largest), *rest)

    monkeypatch.setattr(loaded, "Planner", with_small_buffers)
    with zincmetal.load(path, device="cpu", context=64) as model:
        windows = model.engine.planner.addresses.windows
        assert windows.keys() == {t.name for t in tables}
        assert all(len(parts) >= 3 for parts in windows.values())
        assert max(m.nbytes for m in model.engine.planner.addresses.maps) <= largest
        assert np.abs(model.logits(ids) - expected[0]).max() < 1e-4
        assert model.generate(ids, 6).tokens == expected[1]
        assert model.generate(ids, 6, temperature=1, seed=3).tokens == expected[2]


def test_a_tensor_larger_than_the_largest_buffer_is_refused(device):
    with gguf.open(PATH) as file:
        largest = max((t for t in file.tensors.values() if t.name.startswith("blk.")), key=lambda t: t.nbytes)
        for unified in (True, False):
            with pytest.raises(DeviceError, match=rf"tensor {largest.name} has {largest.nbytes} bytes"):
                addresses_on(file, device, unified_memory=unified, max_buffer_bytes=largest.nbytes)


def test_loading_says_how_far_it_is(monkeypatch):
    told = []
    with zincmetal.load(PATH, device="cpu", context=64, progress=lambda *p: told.append(p)) as model:
        whole = model.generate([1, 2, 3], max_tokens=5).tokens
    (_, total), (done, _) = told
    assert told == [(0, total), (done, total)]
    assert done == total >= sum(t.nbytes for t in model.file.tensors.values())

    def with_memory_of_its_own(file, target, *rest):
        return Planner(file, replace(target, unified_memory=False), *rest)

    monkeypatch.setattr(loaded, "Planner", with_memory_of_its_own)
    monkeypatch.setattr(addresses, "UPLOAD_BYTES", 100_000)
    told.clear()
    with zincmetal.load(PATH, device="cpu", context=64, progress=lambda *p: told.append(p)) as model:
        assert model.generate([1, 2, 3], max_tokens=5).tokens == whole
    done = [d for d, _ in told]
    assert done == sorted(done)
    assert len(done) > 5
    assert done[0] == 0
    assert {total for _, total in told} == {done[-1]}


# ---- the bytes of a token ---------------------------------------------------------------------------------------

# MB that a token of the full model reads, by path, as measured of decode with the real file.
TABLE = {
    "LM head": 540,
    "SSM": 1089,
    "attention": 290,
    "routed experts": 608,
    "shared expert": 134,
    "router": 84,
}
# A profile of the real file, in GiB over 69 tokens. One of its layers has experts of q5_k, q5_k and q6_k.
PROFILE = {"q8_0": 130.93, "q4_k": 23.65, "q5_k": 15.19, "q6_k": 0.44}


def test_bytes_per_token_by_path(whole, device):
    token = planner(whole, device).plan()
    by_path = Counter()
    for (path, _), nbytes in token.weight_reads().items():
        by_path[path] += nbytes / 1e6
    assert {path: by_path[path] for path in TABLE} == pytest.approx(TABLE, rel=0.02)
    assert by_path.total() == pytest.approx(2746, rel=0.02)
    assert by_path.total() - sum(by_path[path] for path in TABLE) < 2  # norms, one row of the embedding
    assert token.recurrent_bytes() / 1e6 == pytest.approx(132, rel=0.02)


def test_bytes_per_token_by_type(tmp_path, device):
    path = tmp_path / "mixed.gguf"
    synthetic.write(path, replace(synthetic.Sizes(), mixed_layers=1), empty=True)
    with gguf.open(path) as file:
        by_type = planner(file, device).plan().weight_bytes()
    assert {t: 69 * by_type[t] / 2**30 for t in PROFILE} == pytest.approx(PROFILE, rel=0.02)


def test_a_step_of_many_rows_reads_each_expert_once(whole, device):
    model, shapes = planner(whole, device), {n: decode_shape(n) for n in (1, 16, 32)}
    shapes[512] = chunk_shape(512, 0, 1, "argmax")
    experts = {rows: sum(n for (p, _), n in model.plan(shape).weight_reads().items() if p == "routed experts")
               for rows, shape in shapes.items()}  # fmt: skip
    assert experts[16] == 16 * experts[1]
    assert experts[32] == experts[512] == 32 * experts[1]  # 256 experts, of which a row uses 8


def test_a_windowed_layer_reads_its_window(device):
    with gguf.open(DATA / "gemma3-q4_0.gguf") as file:
        short, long = (planner(file, device, context=n, kv="f32") for n in (10, 100))
    cfg = long.config
    assert [layer.window for layer in cfg.layers] == [16, 16, 16, 16, 16, 0, 16]
    row = 2 * 4 * cfg.layers[0].n_head_kv * cfg.layers[0].head_dim
    assert short.kv_read() == 7 * 10 * row
    assert long.kv_read() == (6 * 16 + 100) * row


# ---- the command ------------------------------------------------------------------------------------------------


def test_the_command_prints_the_plan(capsys):
    assert report.main([str(PATH), "-c", "300", "--kv", "q8_0", "--device", "cpu", "--bandwidth", "100"]) == 0
    out = capsys.readouterr().out
    for wanted in ("weights, mapped", "K/V in q8_0", "arena", "total", "largest context", "LM head", "100 GB/s allow"):
        assert wanted in out


def test_the_command_as_json(capsys, device):
    assert report.main([str(PATH), "-c", "300", "--device", "cpu", "--json", "--bandwidth", "100"]) == 0
    printed = json.loads(capsys.readouterr().out)
    with gguf.open(PATH) as file:
        model = planner(file, device, context=300)
        plan, token = model.memory(), model.plan()
    assert printed["memory"]["total"] == plan.total
    assert printed["memory"]["fits"]
    assert set(printed["memory"]["arena_by_rows"]) == {"1", "32", "128", "512"}
    assert sum(n for types in printed["token"]["weights"].values() for n in types.values()) == sum(
        token.weight_bytes().values()
    )
    speed = printed["token"]["tokens_per_second"]
    assert speed["empty"] * sum(token.weight_bytes().values()) == pytest.approx(100e9)
    assert speed["full"] * (sum(token.weight_bytes().values()) + printed["token"]["kv"]) == pytest.approx(100e9)


def test_the_command_says_when_it_does_not_fit(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv(MEMORY_LIMIT.name, "1000000")
    assert report.main([str(PATH), "--device", "cpu"]) == 1
    assert "does not fit" in capsys.readouterr().out
    assert report.main([str(tmp_path / "absent.gguf")]) == 1
    assert "absent.gguf" in capsys.readouterr().err
