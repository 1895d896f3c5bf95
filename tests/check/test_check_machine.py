"""Facts of a Mac, read from the answers of its programs."""

from __future__ import annotations

import sys

import pytest

from zincmetal import watchdog
from zincmetal.check import machine

ANSWERS = {
    "brand_string": "Apple M4 Max\n",
    "AGXAccelerator": '+-o AGXAcceleratorG16X\n    "gpu-core-count" = 40\n    "MetalPluginName" = "AGXMetalG16X"\n',
    "sw_vers": "25B78\n",
    "pmset -g batt": "Now drawing from 'Battery Power'\n -InternalBattery-0 (id=1)\t71%; discharging\n",
    "pmset -g therm": "Note: No thermal warning level has been recorded\n",
    "pmset -g": " lowpowermode         1\n sleep                1 (sleep prevented by x)\n",
    "wired_limit": "0\n",
    "xcodebuild": "Xcode 26.1\nBuild version 17B55\n",
    "metal": "Apple metal version 32023.830 (metalfe-32023.830.2)\nTarget: air64\n",
    "IOMobileFramebuffer": "+-o AppleCLCD2  <class IOMobileFramebufferShim>\n",
    "mount": "/dev/disk3s1 on / (apfs, sealed, local)\n//me@nas/m on /Volumes/models (x) (smbfs, nodev)\n",
}


def ask(command: str) -> str:
    """Answer with the longest key that the command contains."""
    return next((ANSWERS[key] for key in sorted(ANSWERS, key=len, reverse=True) if key in command), "")


def test_facts_are_read_and_what_the_system_does_not_say_is_left_out(monkeypatch):
    monkeypatch.delenv(watchdog.VARIABLE, raising=False)
    assert machine.facts("/Users/me/x.gguf", ask) == {
        "chip": "Apple M4 Max",
        "GPU cores": "40",
        "macOS build": "25B78",
        "Low Power Mode": "1",
        "power source": "Battery Power",
        "wired limit MB": "0",
        "Xcode": "26.1",
        "Metal compiler": "Apple metal version 32023.830 (metalfe-32023.830.2)",
        "display attached": "yes",
        watchdog.VARIABLE: "not set",
        "file system of the model": "apfs",
    }


@pytest.mark.parametrize(("path", "kind"), [("/Volumes/models (x)/a.gguf", "smbfs"), ("/Volumes/other", "apfs")])
def test_the_file_system_is_that_of_the_longest_mount(path, kind):
    assert machine.facts(path, ask)["file system of the model"] == kind


def test_a_mac_that_answers_nothing_gives_no_facts_but_the_environment():
    assert machine.facts("/x", lambda command: "").keys() == {watchdog.VARIABLE}


def test_a_program_that_is_not_there_or_fails_answers_nothing():
    assert machine.run("/no/such/program") == ""
    assert machine.run("/bin/false") == ""
    assert machine.run("/bin/echo a b") == "a b\n"


@pytest.mark.skipif(sys.platform == "darwin", reason="a Mac has facts")
def test_elsewhere_nothing_is_asked():
    assert machine.facts() == {}
