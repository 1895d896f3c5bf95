"""Families: a new one is a module of its own, and its traits say what its files do not."""

from __future__ import annotations

from pathlib import Path

import pytest

import zincmetal
from support.tiny_dense import Tiny
from zincmetal import models
from zincmetal.errors import UnsupportedModelError

MODULE = """
from zincmetal.config import Traits
from zincmetal.models import llama
from zincmetal.models.family import DENSE, Family

FAMILY = Family(
    llama.build,
    Traits(attention_scale=lambda n_layer, embd_per_head, head_dim: 0.5),
    (("attn_", "looking"), *DENSE),
)
"""


@pytest.fixture
def made_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A family called "made_up", from one file in another folder."""
    (tmp_path / "made_up.py").write_text(MODULE)
    monkeypatch.setattr(models, "__path__", [*models.__path__, str(tmp_path)])
    monkeypatch.setattr(models, "FAMILIES", models.discover())
    return "made_up"


def test_a_family_is_one_new_file(made_up: str, tmp_path: Path):
    with zincmetal.load(Tiny(made_up).save(tmp_path / "m.gguf"), device="cpu", context=32) as model:
        assert model.config.attention_scale == 0.5
        assert len(model.generate([1, 2, 3], max_tokens=4).tokens) == 4
        assert {path for path, _ in model.plan(1).weight_reads()} >= {"looking", "feed-forward", "LM head"}


def test_without_its_file_the_family_is_not_known(tmp_path: Path):
    with pytest.raises(UnsupportedModelError, match="'made_up' is not supported; supported: "):
        zincmetal.load(Tiny("made_up").save(tmp_path / "m.gguf"), device="cpu")


def test_every_module_with_a_family_is_found():
    names = {p.stem for p in Path(models.__file__).parent.glob("*.py") if "FAMILY = " in p.read_text()}
    assert names == {name.replace("-", "_") for name in models.FAMILIES}
    assert len(names) >= 7
