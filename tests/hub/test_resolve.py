"""Names of models: the folders of this machine and of other programs, hostile ones too, and what a name stands for."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

import zincmetal
from support.paths import DATA
from zincmetal.cli.main import main
from zincmetal.errors import ModelNotFoundError, UsageError
from zincmetal.hub import catalogue
from zincmetal.hub.lookup import resolve
from zincmetal.hub.names import parse, part_of, quant_of, same_quant, stem
from zincmetal.hub.stores import local_models

MODEL = DATA / "llama-q4_k_m.gguf"
BYTES = MODEL.read_bytes()


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Returns the empty home of a user whose folders are all their defaults."""
    for name in ("ZINCMETAL_MODELS", "ZINCMETAL_OFFLINE", "HF_HUB_OFFLINE", "HF_HUB_CACHE", "HF_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name in ("OLLAMA_MODELS", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("zincmetal.hub.stores.find_demo", lambda: None)
    return tmp_path


def put(path: Path, content: bytes = BYTES) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def own(home: Path, name: str, content: bytes = BYTES) -> Path:
    return put(home / ".cache/zincmetal/models" / name, content)


def hugging_face(home: Path, repo: str, name: str, revision: str = "a" * 40, main: bool = True) -> Path:
    """Writes a file as Hugging Face's cache has it: a blob, and a link in the snapshot of a revision."""
    folder = home / ".cache/huggingface/hub" / f"models--{repo.replace('/', '--')}"
    blob = put(folder / "blobs" / hashlib.sha256(f"{revision}{name}".encode()).hexdigest())
    link = folder / "snapshots" / revision / name
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(os.path.relpath(blob, link.parent))
    if main:
        put(folder / "refs/main", revision.encode())
    return link


def ollama(home: Path, name: str, tag: str, owner: str = "library", content: bytes = BYTES, **manifest: object) -> Path:
    digest = hashlib.sha256(content).hexdigest()
    blob = put(home / ".ollama/models/blobs" / f"sha256-{digest}", content)
    layers = [
        {"mediaType": "application/vnd.ollama.image.template", "digest": "sha256:" + "0" * 64},
        {"mediaType": "application/vnd.ollama.image.model", "digest": f"sha256:{digest}"},
    ]
    text = json.dumps({"layers": layers} | manifest).encode()
    put(home / ".ollama/models/manifests/registry.ollama.ai" / owner / name / tag, text)
    return blob


# ---- names ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("qwen3-8b", ("", "qwen3-8b", "")),
        ("qwen3:8b", ("", "qwen3", "8b")),
        ("owner/repo", ("owner", "repo", "")),
        ("owner/re.po-GGUF:UD-Q4_K_XL", ("owner", "re.po-GGUF", "UD-Q4_K_XL")),
    ],
)
def test_names(text, pieces):
    name = parse(text)
    assert name is not None
    assert (name.owner, name.repo, name.tag) == pieces
    assert str(name) == text


@pytest.mark.parametrize(
    "text",
    [
        *("", "../x", "a/../b", "a..b", "/etc/passwd", "a/b/c", "~/m", "./m", "a:b:c", "a//b", "a/", "/a", ":q"),
        *(
            "model.gguf",
            "a/b.GGUF",
            "a b",
            "a\nb",
            "a\0b",
            "a\x1b[0m",
            "ä",
            "-rf",
            ".hidden",
            "a\\b",
            "C:\\m",
            "a" * 257,
        ),
    ],
)
def test_what_is_no_name(text):
    assert parse(text) is None


@pytest.mark.parametrize(
    ("file", "quant"),
    [
        ("Qwen3-8B-Q4_K_M.gguf", "Q4_K_M"),
        ("m.Q8_0.gguf", "Q8_0"),
        ("m-UD-Q4_K_XL-00001-of-00003.gguf", "UD-Q4_K_XL"),
        ("gemma-3-4b-it-q4_0.gguf", "Q4_0"),
        ("m-IQ4_XS.gguf", "IQ4_XS"),
        ("m-BF16.gguf", "BF16"),
        ("Qwen3-8B.gguf", ""),
        ("Q4_K_M", "Q4_K_M"),
    ],
)
def test_quant_types_of_file_names(file, quant):
    assert quant_of(file) == quant


def test_pieces_of_file_names():
    assert (stem("m-Q8_0-00002-of-00003.gguf"), part_of("m-Q8_0-00002-of-00003.gguf")) == ("m-Q8_0", (2, 3))
    assert (stem("m.GGUF"), part_of("m.gguf")) == ("m", (1, 1))
    assert same_quant("q4_k_xl", "UD-Q4_K_XL")
    assert not same_quant("UD-Q4_K_XL", "Q4_K_XL")


# ---- the folders of each program --------------------------------------------------------------------------------


def test_each_program_s_files_are_found_in_place(home):
    paths = {
        own(home, "loose-Q8_0.gguf"): ("loose-Q8_0", "loose-q8_0"),
        own(home, "me/mine-GGUF/mine-Q4_0.gguf"): ("me/mine-GGUF:Q4_0", "me/mine-GGUF", "mine-gguf:q4_0", "mine-Q4_0"),
        hugging_face(home, "hf/theirs-GGUF", "theirs-Q4_K_M.gguf"): ("hf/theirs-GGUF:Q4_K_M", "theirs-GGUF"),
        hugging_face(home, "hf/deep-GGUF", "Q6_K/deep.gguf"): ("hf/deep-GGUF:Q6_K", "deep"),
        put(home / ".lmstudio/models/lm/studio-GGUF/studio-Q8_0.gguf"): ("lm/studio-GGUF:Q8_0",),
        put(home / ".cache/lm-studio/models/lm/old-GGUF/old-Q8_0.gguf"): ("lm/old-GGUF:Q8_0",),
        ollama(home, "llama3.2", "latest"): ("llama3.2", "llama3.2:latest"),
        ollama(home, "m", "7b", owner="someone", content=BYTES + b"x"): ("someone/m:7b", "m:7b"),
    }
    for path, names in paths.items():
        for name in names:
            assert resolve(name) == path, name
    assert len(local_models()) == len(paths)
    assert {resolve(model.name) for model in local_models()} == set(paths)


def test_the_usual_tag_of_ollama(home):
    ollama(home, "m", "1b", content=BYTES + b"1")
    usual = ollama(home, "m", "latest", content=BYTES + b"2")
    ollama(home, "m", "zz", content=BYTES + b"3")
    assert resolve("m") == usual


def test_variables_move_the_folders(home, tmp_path, monkeypatch):
    monkeypatch.setenv("ZINCMETAL_MODELS", str(tmp_path / "here"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("OLLAMA_MODELS", str(home / ".ollama/models"))
    mine = put(tmp_path / "here/mine.gguf")
    link = hugging_face(home, "a/b", "b-Q8_0.gguf")
    assert resolve("mine") == mine
    with pytest.raises(ModelNotFoundError):
        resolve("a/b")
    monkeypatch.setenv("HF_HUB_CACHE", str(home / ".cache/huggingface/hub"))
    assert resolve("a/b") == link
    monkeypatch.setenv("HF_HUB_CACHE", "relative")  # is passed over
    assert resolve("mine") == mine
    monkeypatch.setenv("ZINCMETAL_MODELS", "relative")
    with pytest.raises(UsageError, match="ZINCMETAL_MODELS must be an absolute path, not 'relative'"):
        resolve("mine")


def test_the_main_revision_counts(home):
    hugging_face(home, "a/b", "b-Q8_0.gguf", "1" * 40)
    current = hugging_face(home, "a/b", "b-Q8_0.gguf", "2" * 40)
    assert resolve("a/b") == current
    assert len(local_models()) == 1


def test_the_preferred_quant_type_is_taken(home):
    for quant in ("Q8_0", "Q6_K", "Q4_K_M", "F16"):
        own(home, f"a/b/b-{quant}.gguf")
    assert resolve("a/b").name == "b-Q4_K_M.gguf"
    assert resolve("a/b:q6_k").name == "b-Q6_K.gguf"
    with pytest.raises(ModelNotFoundError, match=r"zincmetal pull a/b:Q5_K_M"):
        resolve("a/b:Q5_K_M")


def test_zincmetal_s_own_copy_comes_first(home):
    put(home / ".lmstudio/models/a/b/b-Q8_0.gguf")
    mine = own(home, "a/b/b-Q8_0.gguf")
    assert resolve("a/b") == mine


def test_a_split_model_is_one(home):
    first = own(home, "a/b/b-Q8_0-00001-of-00002.gguf")
    with pytest.raises(ModelNotFoundError, match=r"1 of its parts are missing.*pull a/b"):
        resolve("a/b")
    own(home, "a/b/b-Q8_0-00002-of-00002.gguf")
    assert resolve("a/b:Q8_0") == first
    (model,) = local_models()
    assert (len(model.parts), model.nbytes, model.missing) == (2, 2 * len(BYTES), 0)


def test_files_that_are_no_models_are_passed_over(home):
    own(home, "a/b/mmproj-b-F16.gguf")
    own(home, ".partial/b-Q8_0.gguf")
    own(home, "a/b/readme.md")
    assert local_models() == []


# ---- hostile folders --------------------------------------------------------------------------------------------


def test_links_out_of_a_folder_are_passed_over(home):
    secret = put(home / "secret.gguf")
    for folder in (".cache/zincmetal/models", ".lmstudio/models"):
        inside = home / folder / "a/b"
        inside.mkdir(parents=True)
        (inside / "b-Q8_0.gguf").symlink_to(secret)
        (home / folder / "out").symlink_to(home, target_is_directory=True)
    hub = home / ".cache/huggingface/hub/models--a--b"
    (hub / "snapshots/main").mkdir(parents=True)
    (hub / "snapshots/main/b-Q8_0.gguf").symlink_to(secret)
    assert local_models() == []


def test_a_folder_that_is_itself_a_link_is_used(home, tmp_path):
    real = tmp_path / "disk"
    put(real / "a/b/b-Q8_0.gguf")
    (home / ".lmstudio").mkdir()
    (home / ".lmstudio/models").symlink_to(real, target_is_directory=True)
    assert resolve("a/b") == home / ".lmstudio/models/a/b/b-Q8_0.gguf"


@pytest.mark.parametrize("name", ["a\nb.gguf", "a\x1b[31mb.gguf", "a\u202eb.gguf", ".hidden.gguf"])
def test_file_names_that_a_terminal_would_obey_are_passed_over(home, name):
    own(home, name)
    assert local_models() == []


@pytest.mark.parametrize(
    "digest",
    ["sha256:../../../../secret.gguf", "sha256-" + "A" * 64, "sha256:" + "0" * 63, "md5:" + "0" * 64, 7, None],
)
def test_digests_that_lead_elsewhere_are_passed_over(home, digest):
    put(home / "secret.gguf")
    layer = {"mediaType": "application/vnd.ollama.image.model", "digest": digest}
    ollama(home, "m", "x", layers=[layer])
    assert local_models() == []


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[]", b"null", b'{"layers": 1}', b'{"layers": [1]}', b"[" * 100_000, b"\xff"]
)
def test_manifests_of_any_content_are_passed_over(home, text):
    put(home / ".ollama/models/manifests/r/library/m/x", text)
    assert local_models() == []


def test_a_blob_that_is_no_gguf_file_is_passed_over(home):
    ollama(home, "m", "x", content=b"not a model")
    assert local_models() == []


def test_a_pipe_is_no_model(home):
    folder = home / ".cache/zincmetal/models"
    folder.mkdir(parents=True)
    os.mkfifo(folder / "pipe.gguf")
    assert local_models() == []


# ---- what a name stands for -------------------------------------------------------------------------------------


def test_a_file_comes_before_a_name(home, tmp_path, monkeypatch):
    own(home, "here.gguf")
    monkeypatch.chdir(tmp_path)
    put(tmp_path / "here")
    assert resolve("here") == Path("here")


@pytest.mark.parametrize("path", ["absent.gguf", "./absent", "/no/such", "a/b/c", Path("qwen3-8b")])
def test_paths_stay_paths(home, path):
    assert resolve(path) == Path(path)


def test_a_name_of_the_catalogue_finds_its_repository_s_files(home):
    entry = next(e for e in catalogue.ENTRIES if e.name == "qwen3-8b")
    path = put(home / ".lmstudio/models" / entry.repo / "Qwen_Qwen3-8B-Q6_K.gguf")
    assert resolve("qwen3-8b") == path
    assert resolve("Qwen3-8B:Q6_K") == path
    with pytest.raises(ModelNotFoundError, match=r"zincmetal pull qwen3-8b:Q8_0"):
        resolve("qwen3-8b:Q8_0")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("qwen3-8b", r"'qwen3-8b' is not on this machine; get it with `zincmetal pull qwen3-8b`$"),
        ("some/model-GGUF:Q8_0", r"get it with `zincmetal pull some/model-GGUF:Q8_0`$"),
        ("qwen3-8", r"neither a file nor the name of a model; did you mean qwen3-8b\?; `zincmetal models`"),
        ("zzzz", r"neither a file nor the name of a model; `zincmetal models` lists"),
    ],
)
def test_what_is_not_here_says_how_to_get_it(home, name, message):
    with pytest.raises(ModelNotFoundError, match=message):
        zincmetal.load(name)


@pytest.mark.parametrize("variable", ["ZINCMETAL_OFFLINE", "HF_HUB_OFFLINE"])
def test_offline_is_said(home, monkeypatch, variable):
    monkeypatch.setenv(variable, "1")
    with pytest.raises(ModelNotFoundError, match=f"once {variable} no longer forbids the network"):
        resolve("qwen3-8b")


@pytest.mark.parametrize("wrong", [None, 3, b"x", "a\0b"])
def test_what_is_no_path_is_refused(wrong):
    with pytest.raises(UsageError):
        resolve(wrong)


def test_load_and_commands_take_a_name(home, capsys):
    own(home, "tiny/llama-GGUF/llama-Q4_K_M.gguf")
    with zincmetal.load("tiny/llama-GGUF", device="cpu") as model:
        assert model.config.arch == "llama"
    assert main(["inspect", "tiny/llama-GGUF"]) == 0
    assert "llama-Q4_K_M.gguf" in capsys.readouterr().out
    assert main(["inspect", "tiny/none-GGUF"]) == 1
    assert "zincmetal pull tiny/none-GGUF" in capsys.readouterr().err
