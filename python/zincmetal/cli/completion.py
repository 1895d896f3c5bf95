"""``zincmetal completion``: shell scripts that complete the command line, made from the parser."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from .arguments import Parser
from .command import Command

PROGRAM = "zincmetal"


@dataclass(frozen=True)
class Option:
    """Option as shells need it. ``values`` are the words that may follow, if they are known."""

    names: tuple[str, ...]
    help: str
    takes_value: bool
    values: tuple[str, ...]


@dataclass(frozen=True)
class Words:
    """Words of a subcommand: its options, and the values of its positional argument."""

    name: str
    help: str
    options: tuple[Option, ...]
    values: tuple[str, ...]  # of its positional argument; empty if that is a file


def add_arguments(p: Parser) -> None:
    """Add the argument of ``completion``."""
    p.add_argument("shell", choices=tuple(SCRIPTS), help="the shell that the script is for")


def run(args: argparse.Namespace) -> int:
    """Print the script of the chosen shell."""
    print("\n".join(SCRIPTS[args.shell](command_line())))
    return 0


def command_line() -> list[Words]:
    """Collect the words of every subcommand."""
    from .main import COMMANDS

    found = []
    for c in COMMANDS:
        parser = c.prepare(Parser(c.name, c.summary))
        actions = [a for of in (parser, *parser.inner.values()) for a in of.actions]
        options = {a.option_strings[-1]: _option(a) for a in reversed(actions) if a.option_strings}
        places = [*parser.inner, *(v for a in actions if not a.option_strings for v in a.choices or ())]
        found.append(Words(c.name, c.summary, tuple(reversed(options.values())), tuple(places)))
    return found


def _option(action: argparse.Action) -> Option:
    from ..device.backend import DEVICES

    known = DEVICES if action.dest == "device" else action.choices or ()
    return Option(tuple(action.option_strings), action.help or "", action.nargs != 0, tuple(map(str, known)))


def _bash(commands: list[Words]) -> Iterator[str]:
    """Yield the lines of a function that fills COMPREPLY. If it leaves that empty, bash completes file names."""
    names = " ".join([*(c.name for c in commands), "--help", "--version"])
    yield f"_{PROGRAM}() {{"
    yield "    local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD-1]} words="
    yield "    COMPREPLY=()"
    yield '    if [ "$COMP_CWORD" -eq 1 ]; then'
    yield f"        words='{names}'"
    yield "    else"
    yield "        case ${COMP_WORDS[1]} in"
    for c in commands:
        yield f"        {c.name})"
        yield "            case $prev in"
        for option in c.options:
            if option.values:
                yield f"            {'|'.join(option.names)}) words='{' '.join(option.values)}' ;;"
        if free := [name for option in c.options if option.takes_value and not option.values for name in option.names]:
            yield f"            {'|'.join(free)}) ;;"
        flags = " ".join(name for option in c.options for name in option.names)
        yield "            *) case $cur in"
        yield f"               -*) words='{flags}' ;;"
        yield f"               *) words='{' '.join(c.values)}' ;;"
        yield "               esac ;;"
        yield "            esac ;;"
    yield "        esac"
    yield "    fi"
    yield '    [ -n "$words" ] && COMPREPLY=($(compgen -W "$words" -- "$cur"))'
    yield "    return 0"
    yield "}"
    yield f"complete -o default -F _{PROGRAM} {PROGRAM}"


def _zsh(commands: list[Words]) -> Iterator[str]:
    """Yield the lines of a function for compinit. The script may lie in $fpath or be sourced."""
    yield f"#compdef {PROGRAM}"
    yield f"_{PROGRAM}() {{"
    yield "    if (( CURRENT == 2 )); then"
    yield "        local -a commands=("
    for c in commands:
        yield f"            {_quoted(c.name + ':' + c.help)}"
    yield "        )"
    yield "        _describe command commands"
    yield "        _arguments '--help[show the help]' '--version[print the version]'"
    yield "        return"
    yield "    fi"
    yield "    local command=$words[2]"
    yield "    shift words"
    yield "    (( CURRENT-- ))"
    yield "    case $command in"
    for c in commands:
        yield f"    {c.name}) _arguments \\"
        for option in c.options:
            for name in option.names:
                yield f"        {_quoted(_zsh_spec(name, option))} \\"
        yield f"        {_quoted('1:' + c.name + ':' + _zsh_values(c.values))} ;;"
    yield "    esac"
    yield "}"
    yield f'if [ "$funcstack[1]" = _{PROGRAM} ]; then _{PROGRAM} "$@"; else compdef _{PROGRAM} {PROGRAM}; fi'


def _zsh_spec(name: str, option: Option) -> str:
    words = option.help
    for sign in "\\[]:":
        words = words.replace(sign, f"\\{sign}")
    return f"*{name}[{words}]" + (f":value:{_zsh_values(option.values)}" if option.takes_value else "")


def _zsh_values(values: tuple[str, ...]) -> str:
    return f"({' '.join(values)})" if values else "_files"


def _fish(commands: list[Words]) -> Iterator[str]:
    """Yield a line for every word. If no word fits, fish completes file names."""
    first = f"complete -c {PROGRAM} -n __fish_use_subcommand"
    yield f"{first} -l help -d 'show the help'"
    yield f"{first} -l version -d 'print the version'"
    for c in commands:
        yield f"{first} -f -a {c.name} -d {_quoted(c.help)}"
    for c in commands:
        there = f"complete -c {PROGRAM} -n '__fish_seen_subcommand_from {c.name}'"
        if c.values:
            yield f"{there} -f -a '{' '.join(c.values)}'"
        for option in c.options:
            names = " ".join(f"-l {n[2:]}" if n.startswith("--") else f"-s {n[1:]}" for n in option.names)
            value = f" -x -a '{' '.join(option.values)}'" if option.values else " -r" if option.takes_value else ""
            yield f"{there} {names} -d {_quoted(option.help)}{value}"


def _quoted(text: str) -> str:
    """Put a string in single quotes, as all three shells read it."""
    return "'" + text.replace("'", "'\\''") + "'"


SCRIPTS: dict[str, Callable[[list[Words]], Iterator[str]]] = {"bash": _bash, "zsh": _zsh, "fish": _fish}

COMMAND = Command(
    "completion",
    "print a script that completes the command line",
    add_arguments,
    run,
    (
        ("completion bash > ~/.local/share/bash-completion/completions/zincmetal", "for bash"),
        ("completion zsh > ~/.zfunc/_zincmetal", "for zsh, with ~/.zfunc in $fpath before compinit runs"),
        ("completion fish > ~/.config/fish/completions/zincmetal.fish", "for fish"),
    ),
    reader_gone=0,
)
