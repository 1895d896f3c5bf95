"""bench/metal_compile.py with a stand-in for Xcode's tools: its calls, and its reading of the answers."""

from __future__ import annotations

import json
import stat
import sys

import pytest

import metal_compile
from zincmetal.device import backend

# Logs its arguments and makes the file after -o. Refuses the names that the file "faults" beside it lists.
XCRUN = f"""#!{sys.executable} -IS
import json, os, sys
here, args = os.path.dirname(__file__), sys.argv[1:]
with open(here + "/log", "a") as log:
    log.write(json.dumps(args) + "\\n")
for pattern, words in json.load(open(here + "/faults")).items():
    if pattern in " ".join(args):
        sys.exit(words)
with open(args[args.index("-o") + 1], "w") as made:
    made.write("made")
print("a warning" if "common" in " ".join(args) else "")
"""
#: The sources that tests name. One test compiles all of them.
FEW = ("argmax.metal", "elementwise.metal", "ssm.metal")


@pytest.fixture
def xcrun(tmp_path, monkeypatch):
    """Puts the stand-in first on the path. Call the result with the names to refuse; it returns the logged calls."""
    folder = tmp_path / "bin"
    folder.mkdir()
    program = folder / "xcrun"
    program.write_text(XCRUN)
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(folder), prepend=":")

    def run(*argv, **faults):
        (folder / "faults").write_text(json.dumps(faults.get("faults", {})))
        status = metal_compile.main([str(tmp_path / "out"), *argv])
        asked = [json.loads(text) for text in (folder / "log").read_text().splitlines()]
        messages = {m["step"]: m for m in json.loads((tmp_path / "out" / "messages.json").read_text())}
        return status, asked, messages

    return run


@pytest.fixture
def few(tmp_path, monkeypatch):
    """Leaves a few sources: a call of the stand-in for each of all of them takes seconds."""
    folder = tmp_path / "kernels"
    folder.mkdir()
    for name in FEW:
        (folder / name).symlink_to(metal_compile.KERNELS / name)
    monkeypatch.setattr(metal_compile, "KERNELS", folder)


def test_every_file_every_language_and_every_gpu(xcrun, tmp_path):
    status, asked, messages = xcrun()
    assert status == 0
    files = sorted(path.name for path in metal_compile.KERNELS.glob("*.metal"))
    for language in (*metal_compile.LANGUAGES, metal_compile.TENSORS):
        found = [step.split()[1] for step in messages if step.split()[0] == language]
        assert sorted(name for name in found if name != "metallib") == files
    names = sorted(backend.load("cpu").Device().kernel_names())
    tensors = [name for name in names if "_coop_" in name]
    usual = [name for name in names if "_coop_" not in name]
    for library, wanted in (("zincmetal", usual), ("zincmetal_4", tensors)):
        script = json.loads((tmp_path / "out" / f"{library}.mtlp-json").read_text())
        functions = [p["compute_function"] for p in script["pipelines"]["compute_pipelines"]]
        assert functions == [f"alias:zincmetal#{name}" for name in wanted]
        assert script["libraries"]["paths"] == [{"label": "zincmetal", "path": f"./{library}.metallib"}]
    inputs = [args[5:7] for args in asked if args[2] == "metal-tt"]  # as in Apple's article on such scripts
    gpus = metal_compile.GPUS
    assert inputs.count(["zincmetal.metallib", "zincmetal.mtlp-json"]) == sum(map(len, gpus.values()))
    assert inputs.count(["zincmetal_4.metallib", "zincmetal_4.mtlp-json"]) == len(gpus["M5"])


@pytest.mark.usefixtures("few")
def test_a_refused_kernel_fails_the_run_and_the_rest_goes_on(xcrun):
    status, _, messages = xcrun("--kernels", "add", faults={"metal3.1/ssm.air": "ssm.metal:1: error: no such thing"})
    assert status == 1
    assert messages["metal3.1 ssm.metal"]["words"] == "ssm.metal:1: error: no such thing"
    assert messages["metal3.2 ssm.metal"]["status"] == 0
    assert messages["M5 applegpu_g17s"]["status"] == 0


@pytest.mark.usefixtures("few")
def test_a_gpu_or_language_that_the_tools_do_not_know_is_no_failure_but_the_shipped_language_is(xcrun):
    faults = {"-std=metal4.0": "error: invalid value 'metal4.0'", "applegpu_g17": "error: unknown architecture"}
    status, _, messages = xcrun("--kernels", "add", faults=faults)
    assert status == 0
    assert messages["M5 applegpu_g17g"]["status"] != 0
    assert xcrun("--kernels", "add", faults={"-std=metal3.1": "error: invalid value 'metal3.1'"})[0] == 1


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("words", ["unsupported GPU architecture", "invalid target arch", "Unknown architecture"])
def test_ways_to_say_that_a_gpu_is_not_known(words, xcrun):
    assert xcrun("--kernels", "add", faults={"applegpu_g17s": f"error: {words} 'applegpu_g17s'"})[0] == 0


@pytest.mark.usefixtures("few")
def test_sources_compile_where_the_wheel_did_not_build(xcrun, monkeypatch):
    """The compiler's messages are needed most where no wheel was built."""

    def missing():
        raise ImportError("no module named zincmetal")

    monkeypatch.setattr(metal_compile, "kernel_names", missing)
    status, asked, messages = xcrun(faults={"metal3.1/ssm.air": "ssm.metal:1: error: no such thing"})
    assert status == 1
    assert messages["metal3.1 ssm.metal"]["words"] == "ssm.metal:1: error: no such thing"
    assert messages["metal4.0 argmax.metal"]["status"] == 0
    assert "install zincmetal" in messages["names of kernels"]["words"]
    assert not any(args[2] == "metal-tt" for args in asked)


@pytest.mark.usefixtures("few")
def test_a_backend_that_refuses_a_kernel_fails_the_run(xcrun):
    assert xcrun("--kernels", "add", faults={"applegpu_g13g": "error: too many registers in kernel add"})[0] == 1


def test_without_xcode_it_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert metal_compile.main([str(tmp_path / "out"), "--kernels", "add"]) == 1
    assert "xcrun" in capsys.readouterr().out
