"""``dag-hesse completion SHELL``: a script for the shell, made from the parser, so that Tab starts no Python."""

from __future__ import annotations

import argparse
import functools
import shlex
from pathlib import Path
from typing import Any

from dag_hesse._cli import fish
from dag_hesse._cli.spec import BUILT_IN
from dag_hesse.files import show

_SCRIPT = """_dag_hesse() {{
  local word="${{COMP_WORDS[COMP_CWORD]}}" before="${{COMP_WORDS[COMP_CWORD-1]}}" words=""
  case "${{COMP_CWORD}} ${{COMP_WORDS[1]}} $before" in
    "1 "*) words={commands} ;;
{cases}
  esac
  COMPREPLY=($(compgen -W "$words" -- "$word"))
}}
complete -F _dag_hesse dag-hesse
"""
_FILES = 'COMPREPLY=($(compgen -f -- "$word")); return ;;'
_ZSH = "autoload -U +X bashcompinit && bashcompinit\n"


def add(commands: Any, top: argparse.ArgumentParser) -> None:
    """The command."""
    command = commands.add_parser(
        "completion",
        help="print what makes Tab complete commands and options",
        description="Print a script that makes Tab complete commands, options and built-in SPECs.",
        epilog="bash: dag-hesse completion bash > ~/.local/share/bash-completion/completions/dag-hesse; "
        'zsh: dag-hesse completion zsh > ~/.dag-hesse.zsh, and "source ~/.dag-hesse.zsh" after compinit in ~/.zshrc; '
        "fish: dag-hesse completion fish > ~/.config/fish/completions/dag-hesse.fish.",
    )
    command.add_argument("shell", choices=("bash", "zsh", "fish"), help="which shell")
    command.set_defaults(run=functools.partial(_completion, commands, top))


def _completion(commands: Any, top: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    if options.shell == "fish":
        helps = {choice.dest: choice.help or "" for choice in commands._choices_actions}
        show(fish.script(commands.choices, helps, top), end="")
        return
    show((_ZSH if options.shell == "zsh" else "") + script(commands.choices, top), end="")


def script(commands: dict[str, argparse.ArgumentParser], top: argparse.ArgumentParser) -> str:
    """For bash, and for zsh that has been taught bash's."""
    cases = [line for name, command in commands.items() for line in _cases(name, command)]
    first = [*commands, *_options(top)]
    return _SCRIPT.format(commands=shlex.quote(" ".join(first)), cases="\n".join(cases))


def _cases(name: str, command: argparse.ArgumentParser) -> list[str]:
    """What may follow each option that takes a value, then what else may stand there."""
    found, words = [], _options(command)
    for action in command._actions:
        choices = [str(choice) for choice in action.choices or ()]
        if not action.option_strings:
            words += choices or (list(BUILT_IN) if action.metavar == "SPEC" else [])
        elif action.nargs != 0:
            files = action.type is Path or action.metavar == "FILE"
            after = _FILES if files else f"words={shlex.quote(' '.join(choices))} ;;"
            found += [f'    *" {name} {option}") {after}' for option in action.option_strings]
    return [*found, f'    *" {name} "*) words={shlex.quote(" ".join(words))} ;;']


def _options(command: argparse.ArgumentParser) -> list[str]:
    return [option for action in command._actions for option in action.option_strings if option.startswith("--")]
