"""Checks MSL's restrictions that clang does not know: on the tokens, on the syntax tree and on the IR."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from .clang import Program, Violation
from .ir import arguments_of
from .memory import memory_violations
from .metal_names import FUNCTIONS_OF_METAL, TYPES_OF_METAL
from .registers import matrix_violations
from .signatures import attribute_violations, kernel_violations
from .source import HOST
from .tokens import SPACES, Token, closing, tokenize
from .uniformity import uniformity_violations

MAX_THREADGROUP_BYTES = 32 * 1024
MAX_PRIVATE_BYTES = (
    32 * 1024
)  # bytes of a thread's variables, unoptimised: our own limit, since no document gives Apple's
WORDS = {
    "asm": "assembly",
    "catch": "exceptions",
    "char16_t": "such characters",
    "char32_t": "such characters",
    "delete": "delete",
    "double": "double",
    "dynamic_cast": "run-time types",
    "goto": "goto",
    "__int128": "integer longer than long",
    "new": "new",
    "noexcept": "noexcept",
    "register": "register",
    "std": "the C++ library",
    "thread_local": "thread_local",
    "throw": "exceptions",
    "try": "exceptions",
    "typeid": "run-time types",
    "virtual": "virtual functions",
    "wchar_t": "such characters",
}
# Keywords of MSL, which may not be names.
KEYWORDS = {"fragment", "object_data", "ray_data", "threadgroup_imageblock", "vertex"}


def violations(program: Program) -> list[Violation]:
    """Lists the rules that a kernel file breaks, in the order of its lines."""
    found = set(token_violations(program.source.tokens)) | set(attribute_violations(program.source))
    found |= {v for kernel in program.source.kernels for v in kernel_violations(kernel)}
    found |= set(program.errors)
    if not program.errors:
        found |= set(tree_violations(program)) | set(ir_violations(program))
        found |= set(matrix_violations(program))
    return sorted(found, key=lambda v: (v.file, v.line, v.rule, v.message))


def hazards(program: Program) -> list[Violation]:
    """Lists legal code of a kernel file that is undefined on a GPU, in the order of its lines."""
    found = set(uniformity_violations(program)) | set(memory_violations(program))
    return sorted(found, key=lambda v: (v.file, v.line, v.rule, v.message))


# ---- tokens ------------------------------------------------------------------------------------------------------


def token_violations(tokens: list[Token]) -> Iterator[Violation]:
    for i, token in enumerate(tokens):
        is_specifier = token.text == "noexcept" and tokens[i + 1].text != "("
        if token.kind == "word" and token.text in WORDS and not is_specifier:
            yield Violation("language", token.file, token.line, f"{token.text}: MSL has no {WORDS[token.text]}")
        if token.text in KEYWORDS:
            yield Violation("language", token.file, token.line, f"{token.text} is a word of MSL's own")
        is_long = token.text == "long" and i > 0 and tokens[i - 1].text == "long"
        if is_long or (token.kind == "number" and re.fullmatch(r"[\da-fA-FxX']+[uU]?(ll|LL)[uU]?", token.text)):
            yield Violation("language", token.file, token.line, "long long: MSL has no integer longer than long")
        if token.text == "[" and begins_lambda(tokens, i):
            yield Violation("language", token.file, token.line, "MSL has no lambda expressions")


def begins_lambda(tokens: list[Token], i: int) -> bool:
    """Whether this [ begins a lambda: it follows nothing that it could index, and opens no attribute."""
    before = tokens[i - 1] if i else None
    if tokens[i + 1].text == "[" or before is None or before.text == "[":
        return False
    if before.text != "return" and (before.kind != "sign" or before.text in (")", "]", ">", "&", "*")):
        return False
    after = tokens[closing(tokens, i) + 1 :][:1]
    return after != [] and after[0].text in ("(", "{", "<")  # and not the = of an array's designator


# ---- the syntax tree ---------------------------------------------------------------------------------------------

FUNCTIONS = {"FunctionDecl", "CXXMethodDecl", "CXXConstructorDecl", "CXXConversionDecl"}
DECLARATORS = {"VarDecl", "ParmVarDecl", "FieldDecl", "TypedefDecl", *FUNCTIONS}
CASTS = {"CStyleCastExpr", "CXXReinterpretCastExpr", "CXXStaticCastExpr", "CXXFunctionalCastExpr"}


def offset(location: dict[str, Any]) -> int | None:
    """Returns a node's offset in the text that clang read; for a macro, of its use."""
    found: int | None = location.get("expansionLoc", location).get("offset")
    return found


class TreeRules:
    """The rules on declarations, which need the syntax tree."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.text = program.source.text.encode()
        self.found: set[Violation] = set()

    def report(self, rule: str, at: int, message: str) -> None:
        self.found.add(Violation(rule, *self.program.place(at), message))

    def words(self, begin: int, end: int) -> list[str]:
        return [token.text for token in tokenize(self.text[begin:end].decode(), "", 0)]

    def walk(self, node: dict[str, Any], in_function: bool = False) -> None:
        kind = node.get("kind")
        begin = offset(node.get("range", {}).get("begin", {}))
        if begin is not None:
            if kind in DECLARATORS:
                self.check_declarator(node, begin, in_function)
            elif kind == "TypeAliasDecl":
                end = offset(node["range"]["end"]) or begin
                text = self.text[begin : end + node["range"]["end"].get("tokLen", 0)].partition(b"=")
                self.check_spaces(begin + len(text[0]) + 1, begin + sum(map(len, text)), node.get("name", ""))
            elif kind in CASTS:
                self.check_cast(node, begin)
            elif kind == "ConditionalOperator" and "ext_vector" in str(node["inner"][0].get("type")):
                self.report("language", begin, "?: takes a scalar condition; select chooses by components")
        for inner in node.get("inner", []):
            if inner:
                self.walk(inner, in_function or kind in FUNCTIONS)

    def check_declarator(self, node: dict[str, Any], begin: int, in_function: bool) -> None:
        at = offset(node.get("loc", {}))
        if at is None or node.get("isImplicit"):
            return
        name, kind, type_ = node.get("name", "a parameter"), node["kind"], node.get("type", {}).get("qualType", "")
        if kind not in FUNCTIONS and re.search(r"\([*&][^()]*\)\(", type_):
            self.report("function pointer", begin, f"{name} is a pointer to a function")
        else:
            self.check_spaces(begin, at, name)
        if node.get("variadic"):
            self.report("language", begin, f"{name} takes any number of arguments: MSL has no such functions")
        if kind == "VarDecl" and (not in_function or node.get("storageClass") == "static"):
            words = set(self.words(begin, at))
            if not {"constant", "constexpr"} <= words and not (in_function and "threadgroup" in words):
                self.report("program scope", begin, f"{name} lives longer than a call and is not `constant constexpr`")

    def check_spaces(self, begin: int, end: int, name: str) -> None:
        """Checks that every * and & of a declaration, from its first word to its name, has an address space."""
        words = without_values(self.words(begin, end))
        pointers = sum(word in ("*", "&") for word in words)
        if pointers > sum(word in SPACES for word in words):
            self.report("address space", begin, f"{name}: a pointer or reference without an address space")

    def check_cast(self, node: dict[str, Any], begin: int) -> None:
        operand = offset(node["inner"][0].get("range", {}).get("begin", {})) if node.get("inner") else None
        if operand is not None and node["kind"] != "CXXFunctionalCastExpr":
            self.check_spaces(begin, operand, "cast")


def without_values(words: list[str]) -> list[str]:
    """Returns the words of a declaration without extents and without earlier declarators' initialisers."""
    kept: list[str] = []
    depth, square, in_value = 0, 0, False
    for word in words:
        depth -= word in (")", "}")
        square -= word == "]"
        if depth == 0 and square == 0 and word in ("=", "{", ","):
            in_value = word != ","
        if not in_value and square == 0:
            kept.append(word)
        square += word == "["
        depth += word in ("(", "{")
    return kept


def tree_violations(program: Program) -> set[Violation]:
    rules = TreeRules(program)
    for node in program.tree["inner"]:
        begin = offset(node.get("range", {}).get("begin", {}))
        if begin is not None and not program.is_standard(begin):
            rules.walk(node)
            if message := name_fault(node):
                rules.report("name", begin, message)
    return rules.found


def name_fault(node: dict[str, Any]) -> str:
    """Returns the fault of a global name beside the names of metal::, or ""."""
    name, is_function = node.get("name", ""), node["kind"] in (*FUNCTIONS, "FunctionTemplateDecl")
    if node["kind"] in ("UsingDecl", "UsingDirectiveDecl") or node.get("isImplicit"):
        return ""
    if is_function and name == "main":
        return "main is no name for a function"
    if name in TYPES_OF_METAL or (name in FUNCTIONS_OF_METAL and not is_function):
        return f"{name} is a name of metal::"
    return ""


# ---- the IR ------------------------------------------------------------------------------------------------------

DEFINITION = re.compile(r'^define [^@\n]*@("[^"]+"|[\w.$]+)\(.*?^}', re.MULTILINE | re.DOTALL)
CALL = re.compile(r'\b(?:call|invoke) .*?([@%](?:"[^"]+"|[\w.$]+))\(')
GLOBAL = re.compile(r"^@([\w.$]+) = (.*)$", re.MULTILINE)
THREADGROUP_ARRAY = re.compile(r"addrspace\(3\) global \[(\d+) x i8\]")


def ir_violations(program: Program) -> Iterator[Violation]:
    file = program.source.instances[0].file if program.source.instances else program.path.name
    bodies = {match[1]: match[0] for match in DEFINITION.finditer(program.ir)}
    calls = {name: set(CALL.findall(body)) for name, body in bodies.items()}
    kernels = kernel_functions(program)
    for name in recursive(calls):
        yield Violation("recursion", file, 0, f"{name} calls itself, or what calls it")
    for name, body in bodies.items():
        if any(callee.startswith("%") for callee in calls[name]):
            yield Violation("function pointer", file, 0, f"{name} calls through a pointer")
        if "addrspacecast" in body:
            yield Violation("address space", file, 0, f"{name} casts from one address space to another")
        if re.search(r"\bdouble\b", body):
            yield Violation("language", file, 0, f"{name} computes in double")
        yield from (Violation(rule, file, 0, f"{name} {words}") for rule, words in body_faults(body))
        for called in {callee[1:] for callee in calls[name]} & kernels:
            yield Violation("kernel call", file, 0, f"{name} calls the kernel {called}")
    yield from (Violation(rule, file, 0, message) for rule, message in global_faults(program))
    for name, used in private_bytes(bodies, calls, dict(STRUCTURE.findall(program.ir))).items():
        if name in kernels and used > MAX_PRIVATE_BYTES:
            message = f"{name} has {used} bytes of its own per thread; {MAX_PRIVATE_BYTES} are the most"
            yield Violation("private memory", file, 0, message)
    for name, used in threadgroup_bytes(program).items():
        if used > MAX_THREADGROUP_BYTES:
            message = f"{name} has {used} bytes of threadgroup memory; there are {MAX_THREADGROUP_BYTES}"
            yield Violation("threadgroup memory", file, 0, message)


def body_faults(body: str) -> Iterator[tuple[str, str]]:
    """Yields (rule, fault) of a function's body."""
    if re.search(r"\bselect <\d+ x i1>", body):
        yield "language", "chooses by a vector: ?: takes a scalar condition"
    if re.search(r"\bstore ptr [^,]*, ptr addrspace\([123]\)", body) or re.search(r"\bptrtoint ptr %", body):
        yield "address space", "lets a pointer into a thread's own memory out"


def private_bytes(bodies: dict[str, str], calls: dict[str, set[str]], structures: dict[str, str]) -> dict[str, int]:
    """Returns the bytes of each function's variables and of its calls, on the chain of calls that has most."""
    own = {name: sum(type_bytes(t, structures) for t in ALLOCA.findall(body)) for name, body in bodies.items()}
    total: dict[str, int] = {}

    def count(name: str, above: frozenset[str]) -> int:
        if name not in total:
            called = [c[1:] for c in calls[name] if c[1:] in own and c[1:] not in above]
            total[name] = own[name] + max((count(c, above | {name}) for c in called), default=0)
        return total[name]

    return {name: count(name, frozenset()) for name in bodies}


ALLOCA = re.compile(r"= alloca (.*?), align")
STRUCTURE = re.compile(r'^(%(?:"[^"]+"|[\w.$]+)) = type <?(\{.*\})', re.MULTILINE)
WIDTHS = {"half": 2, "bfloat": 2, "float": 4, "double": 8, "ptr": 8}


def type_bytes(type_: str, structures: dict[str, str]) -> int:
    """Returns the bytes of a type of the IR, without padding."""
    type_ = structures.get(type_.strip(), type_.strip())
    several = re.fullmatch(r"[<\[](\d+) x (.*)[>\]]", type_)
    if several is not None:
        return int(several[1]) * type_bytes(several[2], structures)
    if type_.startswith("{"):
        return sum(type_bytes(part, structures) for part in arguments_of(type_[1:-1]))
    return int(type_[1:]) // 8 if re.fullmatch(r"i\d+", type_) else WIDTHS.get(type_, 0)


def recursive(calls: dict[str, set[str]]) -> set[str]:
    """Returns the functions that can call themselves."""
    graph = {name: {callee[1:] for callee in callees if callee[1:] in calls} for name, callees in calls.items()}
    found = set()
    for start in graph:
        reached, new = set[str](), set(graph[start])
        while new:
            reached |= new
            new = set().union(*(graph[name] for name in new)) - reached
        if start in reached:
            found.add(start)
    return found


def global_faults(program: Program) -> Iterator[tuple[str, str]]:
    kernels = kernel_functions(program)
    for name, definition in GLOBAL.findall(program.ir):
        if name in ("llvm.global_ctors", "llvm.global_dtors"):
            yield "program scope", f"an initialiser runs code: {definition}"
        is_local = name.startswith("_ZZ")  # the other rules need the syntax tree
        if "addrspace(3)" in definition and is_local and enclosing_function(name) not in kernels:
            yield "threadgroup memory", f"{name} is not declared in a kernel function"


def functions_of_instances(program: Program) -> list[tuple[str, str]]:
    """Yields (host name, mangled name of the function) of each instance."""
    pointers = re.findall(rf"^@_ZL\d+{HOST}(\d+) = .*? ptr @([\w.$]+)", program.ir, re.MULTILINE)
    return [(program.source.instances[int(i)].host_name, function) for i, function in pointers]


def kernel_functions(program: Program) -> set[str]:
    """Returns the mangled names of the kernels, with or without a host name."""
    marks = re.search(r"^@llvm.global.annotations = (.*)$", program.ir, re.MULTILINE)
    marked = re.findall(r'{ ptr @("[^"]+"|[\w.$]+), ptr', marks[1]) if marks else []
    return {function for _, function in functions_of_instances(program)} | set(marked)


def enclosing_function(variable: str) -> str:
    """Returns _Z1f of _ZZ1fE4name, the Itanium ABI's name of a function's static variable."""
    return re.sub(r"E\d+threadgroup_\w+$", "", "_Z" + variable.removeprefix("_ZZ"))


def threadgroup_bytes(program: Program) -> dict[str, int]:
    """Returns the bytes of threadgroup memory of each instance, with every array at a multiple of 16."""
    bytes_of: dict[str, int] = defaultdict(int)
    for name, definition in GLOBAL.findall(program.ir):
        size = THREADGROUP_ARRAY.search(definition)
        if size is not None:
            bytes_of[enclosing_function(name)] += -(-int(size[1]) // 16) * 16
    return {name: bytes_of[function] for name, function in functions_of_instances(program)}
