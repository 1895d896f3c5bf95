"""The verdict on a model that is not here yet is what the planner says when it is. The catalogue says what is so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import synthetic
from support.paths import DATA
from zincmetal import gguf, models
from zincmetal.cli.main import main
from zincmetal.config import ModelConfig
from zincmetal.errors import GGUFError
from zincmetal.gguf import quants
from zincmetal.hub import catalogue, fit
from zincmetal.hub.catalogue import ENTRIES, Entry
from zincmetal.hub.fit import Bandwidth, Machine, measure, published
from zincmetal.hub.mixes import types_of
from zincmetal.hub.names import parse
from zincmetal.hub.shape import QUANTS, Convolutions, Delta, Gemma4, MoE, Shape, file_bytes, stand_in, tensors
from zincmetal.plan.planner import Planner

FIXTURES = {
    "gemma3-q4_0": "Q4_0",
    "llama-q4_k_m": "Q4_K_M",
    "qwen3-q4_0": "Q4_0",
    "qwen3-q8_0": "Q8_0",
    "qwen3moe-q4_k_m": "Q4_K_M",
    "qwen35-q4_k_m": "Q4_K_M",
    "qwen35moe-q4k-q5k-q8": "UD-Q4_K_XL",
}


@pytest.fixture(scope="module")
def machine() -> Machine:
    return Machine.of("cpu", 100)


def shape_of(file: gguf.File, cfg: ModelConfig) -> Shape:
    """The sizes of a file, as an entry of the catalogue would have them."""
    moe = MoE(cfg.experts.n, cfg.experts.n_used, cfg.experts.n_ff, cfg.experts.n_ff_shared) if cfg.experts else None
    delta = None
    if ssm := cfg.recurrence:
        interval = [layer.mixer for layer in cfg.layers].index("attention") + 1
        delta = Delta(ssm.n_k_head, ssm.n_v_head, ssm.d_state, ssm.d_conv, interval)
    layer = next(layer for layer in cfg.layers if layer.mixer == "attention")
    sizes = (
        cfg.n_layer,
        cfg.n_embd,
        layer.n_ff,
        layer.n_head,
        layer.n_head_kv,
        layer.head_dim,
        cfg.n_vocab,
        cfg.n_ctx_train,
    )
    return Shape(
        cfg.arch, *sizes, "output.weight" not in file.tensors, max(layer.window for layer in cfg.layers), moe, delta
    )


@pytest.mark.parametrize("name", FIXTURES)
def test_the_stand_in_needs_what_the_file_needs(name, machine):
    compare(DATA / f"{name}.gguf", FIXTURES[name], machine)


#: Shapes of small files, as the catalogue would have them.
SMALL = {
    "families/mistral3": Shape("mistral3", 2, 256, 256, 8, 2, 32, 512, 512),
    "families/seed_oss": Shape("seed_oss", 3, 128, 256, 6, 2, 32, 512, 1024),
    "families/smollm3": Shape("smollm3", 4, 128, 128, 4, 1, 32, 512, 1024, tied=True),
    "families/granite": Shape("granite", 3, 128, 256, 4, 2, 32, 512, 1024, tied=True),
    "families/lfm2": Shape("lfm2", 5, 128, 256, 4, 2, 32, 512, 1024, tied=True, convolutions=Convolutions((2, 4))),
    "families/gpt-oss": Shape("gpt-oss", 4, 128, 128, 4, 1, 32, 512, 2048, window=16, moe=MoE(4, 2, 128)),
    "families/glm4moe": Shape("glm4moe", 3, 128, 256, 6, 2, 32, 512, 1024, moe=MoE(6, 2, 64, 64), n_dense=1),
    "families/minimax-m2": Shape("minimax-m2", 2, 128, 64, 6, 2, 32, 512, 1024, moe=MoE(8, 2, 64)),
    "families/gemma4-moe": Shape(
        "gemma4", 4, 128, 128, 4, 2, 32, 512, 1024, True, 24, MoE(6, 2, 64), gemma4=Gemma4(1, 64, period=2)
    ),
    "families/qwen3next": Shape(
        "qwen3next", 4, 128, 128, 4, 2, 64, 512, 1024, moe=MoE(6, 2, 64, 64), delta=Delta(2, 4, 32)
    ),
}


@pytest.mark.parametrize("name", SMALL)
def test_the_tensors_of_a_family_are_those_of_its_files(name):
    with gguf.open(DATA / f"{name}.gguf") as file:
        there = {t.name: t.shape[t.shape[0] == 1 and len(t.shape) == 2 :] for t in file.tensors.values()}
    assert dict(tensors(SMALL[name])) == there


def test_the_stand_in_of_a_whole_model(smollm2: Path, machine: Machine):
    compare(smollm2, "Q4_1", machine)
    entry = catalogue.find(parse("smollm2-135m"))
    with gguf.open(smollm2) as file:
        cfg = Planner(file, machine.target, 512).config
        assert entry.shape == shape_of(file, cfg)


def test_the_catalogue_has_the_shape_of_gemma(gemma3: Path, machine: Machine):
    entry = catalogue.find(parse("gemma-3-270m"))
    with gguf.open(gemma3) as file:
        assert entry.shape == shape_of(file, Planner(file, machine.target, 512).config)
    compare(gemma3, "Q4_K_M", machine)


def test_its_shapes_are_those_of_the_file_that_was_timed():
    """``bench/synthetic.py`` writes that file: every tensor has the same shape and the same type."""
    entry = catalogue.find(parse("qwen3.6-35b-a3b"))
    assert entry.tested == catalogue.SHAPES
    there = {w.name: (w.shape, w.type) for w in synthetic.tensors(synthetic.Sizes())}
    guess = stand_in(entry.shape, entry.quants[0]).tensors
    assert {t.name: (t.shape, t.type) for t in guess.values()} == there


def compare(path: Path, quant: str, machine: Machine) -> None:
    """The names of tensors and all states are the same, the whole differs by 3% at most."""
    with gguf.open(path) as file:
        real = Planner(file, machine.target, 512)
        guess = Planner(stand_in(shape_of(file, real.config), quant), machine.target, 512)
        assert set(guess.file.tensors) == set(file.tensors)
        there, thought = real.memory((1, 512)), guess.memory((1, 512))
        assert thought.total == pytest.approx(there.total, rel=0.03)
        assert guess.kv_read() == real.kv_read()
        for part in ("kv_page", "table_page", "slot", "arena", "logits", "other"):
            assert getattr(thought, part) == getattr(there, part), part
        read = [sum(p.plan().weight_bytes().values()) for p in (guess, real)]
        assert read[0] == pytest.approx(read[1], rel=0.09)  # the mixture's fixture has few layers, and more bits in one


@pytest.mark.parametrize(
    ("name", "gigabytes"),
    [
        # As the pages of the repositories say.
        ("qwen3-4b", {"Q8_0": 4.28, "Q6_K": 3.31, "Q5_K_M": 2.89, "Q4_K_M": 2.50}),
        ("qwen3-8b", {"Q8_0": 8.71, "Q6_K": 6.73}),
        ("mistral-small-24b", {"Q8_0": 25.05, "Q6_K": 19.35, "Q5_K_M": 16.76}),
        ("gemma-3-4b", {"Q8_0": 4.13, "Q6_K": 3.19, "Q5_K_M": 2.83, "Q4_K_M": 2.49}),
        ("qwen3.5-9b", {"Q4_K_M": 5.6}),
        ("qwen3.6-35b-a3b", {"UD-Q4_K_XL": 22.1}),
    ],
)
def test_computed_sizes_are_the_published_ones(name, gigabytes):
    entry = catalogue.find(parse(name))
    for quant, size in gigabytes.items():
        assert entry.offer(quant).nbytes / 1e9 == pytest.approx(size, rel=0.02), quant


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda e: e.name)
def test_every_entry_runs(entry: Entry, machine: Machine):
    """The planner takes the stand-in: its family, its heads, its types."""
    assert entry.shape.arch in models.FAMILIES
    name = parse(entry.name)
    assert name
    assert catalogue.find(name) is entry
    assert catalogue.find(parse(entry.repo)) is entry
    assert entry.tested in (catalogue.WHOLE, catalogue.SHAPES, catalogue.FAMILY)
    assert entry.licence
    types = {qtype for q in entry.quants for qtype in types_of(entry.shape, q).values()}
    assert types <= set(quants.SUPPORTED)
    found = machine.fit(entry, entry.offers[0], 1024)
    assert found.memory is None or found.memory.total > entry.offers[0].nbytes


def test_names_of_the_catalogue_are_distinct():
    names = [e.name for e in ENTRIES]
    assert len(set(names)) == len(names)
    assert len({e.repo for e in ENTRIES}) == len(ENTRIES)
    assert {e.shape.arch for e in ENTRIES} <= set(models.FAMILIES)


def test_more_bits_are_more_bytes():
    shape = ENTRIES[-1].shape
    sizes = [file_bytes(shape, q) for q in ("Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M", "Q6_K", "Q8_0", "F16")]
    assert sizes == sorted(sizes)
    assert len(QUANTS) == len(set(QUANTS))


# ---- the verdict ------------------------------------------------------------------------------------------------


def test_a_model_that_is_too_large(machine, monkeypatch):
    entry = catalogue.find(parse("qwen3-8b"))
    offer = entry.offers[0]
    whole = machine.fit(entry, offer, 4096)
    if not whole.memory:
        pytest.skip("this machine has too little memory")
    monkeypatch.setenv("ZINCMETAL_MEMORY_LIMIT", str(offer.nbytes - 1))
    none = machine.fit(entry, offer)
    assert (none.fits, none.verdict, none.largest_context, none.tokens_per_second) == (False, "does not fit", 0, None)
    monkeypatch.setenv("ZINCMETAL_MEMORY_LIMIT", str(whole.memory.total))
    assert machine.fit(entry, offer, 4096).fits
    longer = machine.fit(entry, offer, 8192)
    assert not longer.fits
    assert longer.verdict == f"fits up to {longer.largest_context} tokens"
    assert machine.fit(entry, offer, longer.largest_context).fits
    monkeypatch.setenv("ZINCMETAL_MEMORY_LIMIT", str(offer.nbytes + 1))
    assert machine.fit(entry, offer).verdict == "does not fit"


def test_the_speed_is_bandwidth_over_bytes(machine):
    path = DATA / "llama-q4_k_m.gguf"
    found = machine.fit_file(path, 512)
    assert found.bandwidth == Bandwidth(100, "given")
    with gguf.open(path) as file:
        planner = Planner(file, machine.target, 512)
        token = sum(planner.plan().weight_bytes().values())
    assert found.tokens_per_second == (100e9 / token, 100e9 / (token + planner.kv_read()))
    assert found.fits
    with pytest.raises(GGUFError):
        machine.fit_file(DATA / "absent.gguf")


def test_bandwidths():
    assert published("Apple M4") == Bandwidth(120, "published")
    assert published("Apple M4 Max") == Bandwidth(410, "published")
    assert published("NVIDIA H100 80GB HBM3") == Bandwidth(fit.PUBLISHED["NVIDIA H100"], "published")
    assert published("Apple M40") is None
    assert published("CPU (avx2, 4 threads)") is None
    found = measure()
    assert found.source == "measured"
    assert found.gb_s > 0
    cpu = Machine.of("cpu")
    assert cpu.bandwidth
    assert cpu.bandwidth.source == "measured"


# ---- the commands -----------------------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("ZINCMETAL_MODELS", "HF_HUB_CACHE", "HF_HOME", "OLLAMA_MODELS", "XDG_CACHE_HOME", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("ZINCMETAL_OFFLINE", "1")
    monkeypatch.setattr("zincmetal.hub.stores.find_demo", lambda: None)
    entries = tuple(e for e in ENTRIES if e.name in ("smollm2-135m", "qwen3-0.6b"))
    monkeypatch.setattr(catalogue, "ENTRIES", entries)
    return tmp_path


def put(home: Path, name: str) -> Path:
    path = home / ".cache/zincmetal/models" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes((DATA / "llama-q4_k_m.gguf").read_bytes())
    return path


def test_models_lists_what_is_here_and_what_there_is(home, capsys):
    put(home, "me/mine-GGUF/mine-Q4_K_M.gguf")
    assert main(["models", "--device", "cpu", "--bandwidth", "100"]) == 0
    shown = capsys.readouterr().out
    assert "me/mine-GGUF:Q4_K_M" in shown
    assert "qwen3-0.6b" in shown
    assert "tokens/s are a projection" in shown
    assert main(["models", "--local"]) == 0
    assert "qwen3-0.6b" not in capsys.readouterr().out


def test_models_as_json(home, capsys):
    path = put(home, "me/mine-GGUF/mine-Q4_K_M.gguf")
    assert main(["models", "--device", "cpu", "--bandwidth", "100", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(m["name"], m["paths"]) for m in found["local"]] == [("me/mine-GGUF:Q4_K_M", [str(path)])]
    assert [m["name"] for m in found["catalogue"]] == ["smollm2-135m", "qwen3-0.6b"]
    assert all(m["fits"] and m["bandwidth_source"] == "given" for m in found["catalogue"])


def test_show(home, capsys):
    path = put(home, "me/mine-GGUF/mine-Q4_K_M.gguf")
    for name in ("me/mine-GGUF", "mine-Q4_K_M", str(path)):
        assert main(["show", name, "--device", "cpu", "--bandwidth", "100"]) == 0
        shown = capsys.readouterr().out
        assert str(path) in shown
        assert "fits" in shown
        assert "(projection: 100 GB/s, given)" in shown
    assert main(["show", "qwen3-0.6b", "--device", "cpu", "--bandwidth", "100"]) == 0
    shown = capsys.readouterr().out
    for words in ("Apache-2.0", "tested: its family", "Q8_0", "bartowski/Qwen_Qwen3-0.6B-GGUF"):
        assert words in shown
    assert main(["show", "qwen3-0.6b", "--device", "cpu", "--json"]) == 0
    assert [o["quant"] for o in json.loads(capsys.readouterr().out)["catalogue"]] == [
        "Q4_K_M",
        "Q5_K_M",
        "Q6_K",
        "Q8_0",
    ]
    assert main(["show", "nothing-here", "--device", "cpu"]) == 1


def test_pull_refuses_what_does_not_fit(home, capsys, monkeypatch):
    monkeypatch.setenv("ZINCMETAL_MEMORY_LIMIT", "1000000")
    assert main(["pull", "qwen3-0.6b"]) == 1
    shown = capsys.readouterr().err
    assert "does not fit" in shown
    assert "nothing was downloaded" in shown
    assert main(["pull", "qwen3-0.6b", "--force"]) == 1  # goes on to the hub, which ZINCMETAL_OFFLINE forbids
    assert "ZINCMETAL_OFFLINE forbids the network" in capsys.readouterr().err


def test_rm_asks(home, capsys):
    path = put(home, "me/mine-GGUF/mine-Q4_K_M.gguf")
    assert main(["rm", "me/mine-GGUF"]) == 1
    assert "add --yes" in capsys.readouterr().err
    assert path.exists()
    assert main(["rm", "me/mine-GGUF", "--yes"]) == 0
    assert "freed" in capsys.readouterr().out
    assert not path.exists()
