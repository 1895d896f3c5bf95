"""The double's Foundation and Metal headers agree with Apple's: every constant, and every method's type.

Needs ``ZINCMETAL_APPLE_SDK`` and the package ziglang, as test_metal_compiles.py does. Residency sets, math modes
and other additions of macOS 15 are left out if the SDK is older.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from support.apple_sdk import apple_compile

INCLUDE = Path(__file__).parent / "double" / "include"
METAL = (INCLUDE / "Metal" / "Metal.h").read_text()
FOUNDATION = (INCLUDE / "Foundation" / "Foundation.h").read_text()
MACOS_15 = re.compile(r"MTLMath|ResidencySet|MTLAllocation|mathMode|mathFloatingPoint")
TYPES = ("-Woverriding-method-mismatch", "-Wno-nullability", "-Wno-nullability-completeness")
START = "#import <Foundation/Foundation.h>\n#import <Metal/Metal.h>\n"


def is_in_sdk(text: str) -> bool:
    sdk = os.environ.get("ZINCMETAL_APPLE_SDK")
    if sdk and (Path(sdk) / "Frameworks/Metal.framework/Headers/MTLResidencySet.h").exists():
        return True
    return not MACOS_15.search(text)


def constants() -> list[tuple[str, str]]:
    """Lists name and value of every enumerator."""
    found = []
    for body in re.findall(r"NS_(?:ENUM|OPTIONS)\([^)]*\)\s*\{(.*?)\}", METAL, re.S):
        for n, item in enumerate(filter(None, (part.strip() for part in body.split(",")))):
            name, _, value = item.partition("=")
            found.append((name.strip(), value.strip() or str(n)))
    return found


def declarations() -> list[tuple[str, list[str]]]:
    """Lists every protocol and class with its methods and properties, as written."""
    found = []
    for text in (FOUNDATION, METAL):
        for head, body in re.findall(r"^(@(?:protocol|interface) \w+)(?![\w,\s]*;)(.*?)^@end", text, re.S | re.M):
            members = re.findall(r"^(?:[-+] \(|@property).*?;", body, re.S | re.M)
            found.append((head, [" ".join(m.split()) for m in members if not re.search("ObjectType|KeyType", m)]))
    return found


def selector(member: str) -> str:
    """Returns the selector: a:b: of `- (void)a:(T)x b:(U)y;`, and the getter of a property."""
    if member.startswith("@property"):
        getter = re.search(r"getter=(\w+)", member)
        return getter[1] if getter else re.findall(r"(\w+)(?: NS_\w+)?;", member)[0]
    while re.search(r"\([^()]*\)", member):  # types, from the inside out
        member = re.sub(r"\([^()]*\)", " ", member)
    parts = re.findall(r"(\w+) *:", member)
    return "".join(f"{part}:" for part in parts) or re.findall(r"\w+", member)[0]


def compiles(tmp_path: Path, source: str, *flags: str) -> str:
    file = tmp_path / "check.mm"
    file.write_text(START + source)
    return apple_compile("15.0", ["-c", *flags, str(file), "-o", str(tmp_path / "check.o")])


def test_constants_are_apples(tmp_path: Path) -> None:
    checks = [f"static_assert(long({name}) == long({value}));" for name, value in constants() if is_in_sdk(name)]
    assert len(checks) > 40
    compiles(tmp_path, "\n".join(checks))


def test_a_wrong_constant_is_seen(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="static assertion failed"):
        compiles(tmp_path, "static_assert(long(MTLCommandBufferErrorTimeout) == 3);")


def known() -> list[tuple[str, list[str]]]:
    """Lists the declarations that the SDK has too, without macOS 15's additions to older classes."""
    all_of_them = ((head, [m for m in members if is_in_sdk(m)]) for head, members in declarations())
    return [(head, members) for head, members in all_of_them if is_in_sdk(head) and members]


def test_every_method_is_one_of_apples(tmp_path: Path) -> None:
    names = sorted({selector(m) for _, members in known() for m in members})
    assert len(names) > 70
    uses = "\n".join(f"(void)@selector({name});" for name in names)
    compiles(tmp_path, f"void use() {{ {uses} }}", "-Wundeclared-selector")


def test_methods_have_apples_types(tmp_path: Path) -> None:
    """clang reports a class that declares an inherited method or property again with another type."""
    source = ""
    for head, members in known():
        kind, name = head.split()
        again = f"@interface Again{kind[1]}_{name} : " + (f"NSObject <{name}>" if kind == "@protocol" else name)
        source += "\n".join([again, *members, "@end", ""])
    compiles(tmp_path, source, *TYPES)


@pytest.mark.parametrize(
    "wrong", ["- (int)setBytes:(int)a length:(int)b atIndex:(int)c;", "@property (readonly) int label;"]
)
def test_a_wrong_type_is_seen(wrong: str, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"conflicting|incompatible|mismatch"):
        compiles(tmp_path, f"@interface Again : NSObject <MTLComputeCommandEncoder>\n{wrong}\n@end\n", *TYPES)
