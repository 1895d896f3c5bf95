"""Every key is used, ignored or refused on purpose, and docs/metadata.md says the same."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support import gguf_builder as b
from support.model_files import with_keys
from support.paths import DATA, ROOT
from support.tiny_dense import Tiny
from zincmetal import config, gguf, models
from zincmetal.errors import GGUFError, UnsupportedModelError
from zincmetal.gguf import metadata as keys
from zincmetal.gguf.metadata import IRRELEVANT, IRRELEVANT_PREFIXES, NEUTRAL, SPELLINGS

DOCS = ROOT / "docs" / "metadata.md"
ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma3")


def table(heading: str) -> list[list[str]]:
    """Reads the rows of the table under a heading, as cells."""
    section = DOCS.read_text("utf-8").split(f"\n## {heading}\n")[1].split("\n## ")[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in row] for row in rows]


def documented(outcome: str) -> set[str]:
    return {row[0].strip("`") for row in table("Keys of the architecture") if row[2] == outcome}


def configured(path: Path, tiny: Tiny) -> config.ModelConfig:
    with gguf.open(tiny.save(path / "m.gguf")) as file:
        return models.configure(file)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


# ---- the table ------------------------------------------------------------------------------------------------------


def test_the_table_has_what_is_read(monkeypatch):
    read: set[str] = set()
    get = keys.Keys.get

    def noted(self: keys.Keys, name: str, default: Any = None) -> Any:
        read.add(name)
        return get(self, name, default)

    monkeypatch.setattr(keys.Keys, "get", noted)
    monkeypatch.setattr(keys.Keys, "account", lambda self, activations: None)
    for path in (*DATA.glob("*.gguf"), *DATA.glob("families/*.gguf")):
        with gguf.open(path) as file:
            models.configure(file)
    assert documented("used") == read


def test_the_table_has_what_is_refused_and_what_is_left_alone():
    assert documented("refused") == (NEUTRAL.keys() | {"hidden_activation"}) - documented("used")
    assert documented("irrelevant") == IRRELEVANT | {f"{prefix}*" for prefix in IRRELEVANT_PREFIXES}
    listed = [row[0] for row in table("Keys of the architecture")]
    assert len(listed) == len(set(listed))


def test_the_table_has_the_other_spellings():
    found = {(name, other) for name, others in SPELLINGS.items() for other in others}
    assert {(row[0].strip("`"), row[1].strip("`")) for row in table("Other spellings")} == found


def test_the_table_says_the_neutral_values():
    for key, _, outcome, how in (row for row in table("Keys of the architecture")):
        name = key.strip("`")
        if outcome == "refused" and name != "hidden_activation":
            said = re.match(r"unless (-?[\w.]+)(?: or (-?[\w.]+))?", how)
            assert said, name
            values = {"true": True, "false": False}
            assert [values[v] if v in values else float(v) for v in said.groups() if v] == [*NEUTRAL[name]], name


# ---- what happens ---------------------------------------------------------------------------------------------------

YARN = [name for name in NEUTRAL if name.startswith("rope.scaling.yarn")]
DENSE = [name for name in NEUTRAL if not name.startswith("expert_") and name not in YARN]


def other_than(neutral: tuple[Any, ...]) -> Any:
    first = neutral[0]
    return (not first) if isinstance(first, bool) else type(first)(7)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("name", [*DENSE, "expert_count"])
def test_what_changes_the_result_is_refused_by_name(name, arch, tmp_path, caplog):
    for value in NEUTRAL[name]:
        configured(tmp_path, Tiny(arch, keys={name: value}))
        configured(tmp_path, Tiny(arch, keys={name: [value, value]}))
    assert not warnings(caplog)
    for value in (other_than(NEUTRAL[name]), "yes", [1, 2]):
        with pytest.raises(UnsupportedModelError, match=rf"{arch}\.{re.escape(name)} is"):
            configured(tmp_path, Tiny(arch, keys={name: value}))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_activation_is_the_architectures_own(arch, tmp_path, caplog):
    for word in models.get(arch).traits.activations:
        configured(tmp_path, Tiny(arch, keys={"hidden_activation": word}))
    assert not warnings(caplog)
    with pytest.raises(UnsupportedModelError, match=rf"{arch}.hidden_activation is 'relu'"):
        configured(tmp_path, Tiny(arch, keys={"hidden_activation": "relu"}))


@pytest.mark.parametrize("spelled", [other for others in SPELLINGS.values() for other in others])
def test_other_spellings_are_the_same_key(spelled, tmp_path):
    wrongs = {"rope.mrope_section": [1, 1, 1, 1], "rope.scaling.beta_fast": 0.0, "rope.scaling.beta_slow": 0.0}
    wrong = {**wrongs, "rope.scale_linear": -1.0}.get(spelled, 0.5)
    mixture = spelled in SPELLINGS["expert_weights_norm"]
    if mixture:  # of experts, which the model has not
        configured(tmp_path, Tiny("qwen3", keys={spelled: False}))
        return
    of_yarn = any(spelled in SPELLINGS.get(name, ()) for name in YARN)
    arch, others = ("qwen3", {"rope.scaling.type": "yarn"}) if of_yarn else ("gemma3", {})
    with pytest.raises((GGUFError, UnsupportedModelError), match=re.escape(f"{arch}.{spelled}")):
        configured(tmp_path, Tiny(arch, keys=others | {spelled: wrong}))


def test_a_mixtures_normalisation_in_another_spelling(tmp_path):
    with gguf.open(DATA / "qwen3moe-q4_k_m.gguf") as file:
        for value in (True, False):
            cfg = models.configure(with_keys(file, {"qwen3moe.norm_top_k_prob": value}))
            assert cfg.experts
            assert cfg.experts.router.normalised is value


def test_what_cannot_matter_says_nothing(tmp_path, caplog):
    names = dict.fromkeys(IRRELEVANT, 3) | {f"{prefix}something": "x" for prefix in IRRELEVANT_PREFIXES}
    configured(tmp_path, Tiny("llama", keys=names))
    assert not warnings(caplog)


def test_what_is_unknown_is_named_once(tmp_path, caplog):
    unknown = {"frobnication": 1.0, "attention.mystery": True, **{f"m{i}": i for i in range(10)}}
    configured(tmp_path, Tiny("llama", keys=unknown))
    (message,) = warnings(caplog)
    assert "'llama.frobnication'" in message
    assert "'llama.attention.mystery'" in message
    assert "and 4 more" in message


def test_keys_outside_the_architecture_say_nothing(tmp_path, caplog):
    configured(
        tmp_path, Tiny("qwen3", keys={"other.key": 1, "general.sampling.temp": 0.5, "general.quantised_on": "a Sunday"})
    )
    assert not warnings(caplog)


@pytest.mark.parametrize("path", sorted(DATA.glob("*.gguf")), ids=lambda p: p.stem)
def test_files_of_the_usual_converter_say_nothing(path, caplog):
    with gguf.open(path) as file:
        models.configure(file)
    assert not warnings(caplog)


def test_what_is_no_model_is_refused(tmp_path):
    configured(tmp_path, Tiny("llama", keys={"general.type": "model"}))
    for kind in ("adapter", "mmproj", "imatrix"):
        with pytest.raises(UnsupportedModelError, match=f"general.type is '{kind}'"):
            configured(tmp_path, Tiny("llama", keys={"general.type": kind}))


def test_names_for_people_need_not_be_utf8(tmp_path, caplog):
    tiny = Tiny("llama", keys={"general.name": b"caf\xe9 \xff", "general.tags": [b"ok", b"\xfc"]})
    with gguf.open(tiny.save(tmp_path / "m.gguf")) as file:
        assert file.metadata["general.name"] == "caf� �"
        assert file.metadata["general.tags"] == ["ok", "�"]
    assert [("general.name" in w, "general.tags" in w) for w in warnings(caplog)] == [(True, False), (False, True)]
    with pytest.raises(GGUFError, match="not UTF-8"):
        configured(tmp_path, Tiny("llama", keys={"hidden_activation": b"sil\xfc"}))


@pytest.mark.parametrize("sections", [[4, 2, 2], [4, 2, 2, 0], [0, 0, 0, 0]])
def test_sections_that_text_does_not_need(sections, tmp_path):
    configured(tmp_path, Tiny("qwen3", keys={"rope.dimension_sections": sections}))


@pytest.mark.parametrize("sections", [[2, 1, 1, 4], [4, -1, 0, 0], [1, 1, 1, 1, 1], 3, [0.5, 1.0]])
def test_other_sections_are_refused(sections, tmp_path):
    with pytest.raises((GGUFError, UnsupportedModelError), match=r"qwen3.rope.dimension_sections"):
        configured(tmp_path, Tiny("qwen3", keys={"rope.dimension_sections": sections}))


# ---- as other programs write them -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", YARN)
def test_the_keys_of_yarn(name, tmp_path):
    yarn = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}
    for value in NEUTRAL[name]:
        configured(tmp_path, Tiny("qwen3", keys=yarn | {name: value}))
    with pytest.raises(UnsupportedModelError, match=rf"qwen3\.{re.escape(name)} is 7"):
        configured(tmp_path, Tiny("qwen3", keys=yarn | {name: 7.0}))


@pytest.mark.parametrize(
    ("pattern", "windows"),
    [
        ([True, False], (9, 0)),
        (2, (9, 0)),
        ((b.ARRAY, b.numbers(b.U32, [1, 0])), (9, 0)),
        (1, (0, 0)),
    ],
    ids=["booleans", "period-2", "u32", "period-1"],
)
def test_patterns_of_windows_as_converters_write_them(pattern, windows, tmp_path):
    keys = {"attention.sliding_window": 9, "attention.sliding_window_pattern": pattern}
    layers = configured(tmp_path, Tiny("gemma3", keys=keys)).layers
    assert tuple(layer.window for layer in layers) == windows


@pytest.mark.parametrize("wrong", [(b.ARRAY, b.numbers(b.U32, [0, 2])), [True], [0.5, 1.0]], ids=["2", "1", "halves"])
def test_other_patterns_of_windows_are_refused(wrong, tmp_path):
    with pytest.raises(GGUFError, match=r"gemma3\.attention\.sliding_window_pattern"):
        configured(tmp_path, Tiny("gemma3", keys={"attention.sliding_window_pattern": wrong}))


def test_sections_are_no_scaling(tmp_path, caplog):
    assert configured(tmp_path, Tiny("llama", keys={"rope.scaling.type": "mrope"})) == configured(
        tmp_path, Tiny("llama")
    )
    assert not warnings(caplog)


def hybrid(keys: dict[str, Any]) -> config.ModelConfig:
    """Reads the configuration of a hybrid model with these keys changed; None removes a key."""
    with gguf.open(DATA / "qwen35-q4_k_m.gguf") as file:
        return models.configure(with_keys(file, {f"qwen35.{name}": value for name, value in keys.items()}))


def test_recurrent_blocks_may_have_no_heads(tmp_path, caplog):
    usual = hybrid({})
    heads = np.array([0, 0, 0, usual.layers[3].n_head_kv])
    assert hybrid({"attention.head_count_kv": heads}) == usual
    untold = {"attention.recurrent_layers": None, "full_attention_interval": None}
    assert hybrid(untold | {"attention.head_count_kv": heads}) == usual
    mixers = [layer.mixer for layer in hybrid(untold | {"attention.head_count_kv": heads[::-1]}).layers]
    assert mixers == ["attention", "recurrent", "recurrent", "recurrent"]
    assert hybrid({"attention.recurrent_layers": np.array([1, 1, 1, 0], np.uint32)}) == usual
    assert not warnings(caplog)
    with pytest.raises(GGUFError, match="has 0 for every block"):
        hybrid({"attention.head_count_kv": heads * 0})
    with pytest.raises(GGUFError, match="0 for block 3, which attends"):
        hybrid({"attention.head_count_kv": heads[::-1]})
    with pytest.raises(GGUFError, match=r"llama\.attention\.head_count_kv"):
        configured(tmp_path, Tiny("llama", keys={"attention.head_count_kv": [0, 1]}))


def test_value_heads_in_another_order_are_refused(caplog):
    hybrid({"ssm.v_head_reordered": True, "rope.mrope_interleaved": True, "image_token_id": 7})
    assert not warnings(caplog)
    with pytest.raises(UnsupportedModelError, match=r"qwen35\.ssm\.v_head_reordered is False"):
        hybrid({"ssm.v_head_reordered": False})


def test_what_llama_cpps_saver_writes_for_every_architecture(tmp_path, caplog):
    """It writes defaults that the model does not apply, and keys of other architectures with value 0."""
    saved = {
        **keys.SAVER_DEFAULTS,
        "wkv.head_size": 0,
        "attention.q_lora_rank": 0,
        "attention.scale": 0.0,
        "deepstack_mapping": [0, 0],
        "kda.safe_gate": False,
        "rope.scaling.type": "linear",
        "rope.scaling.factor": 0.0,
        "rope.scaling.yarn_ext_factor": -1.0,
        "swiglu_clamp_exp": [0.0, 0.0],
    }
    configured(tmp_path, Tiny("llama", keys=saved))
    assert not warnings(caplog)
    for name, value in (("attn_logit_softcapping", 20.0), ("logit_scale", 0.5)):
        with pytest.raises(UnsupportedModelError, match=name):
            configured(tmp_path, Tiny("llama", keys=saved | {name: value}))
    configured(tmp_path, Tiny("llama", keys=saved | {"kda.head_dim": 64}))
    assert "'llama.kda.head_dim'" in warnings(caplog)[0]
    with pytest.raises(UnsupportedModelError, match="attn_logit_softcapping is 50"):
        configured(tmp_path, Tiny("llama", keys=saved | {"wkv.head_size": None, "attention.scale": None}))
