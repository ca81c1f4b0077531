"""Completion for the fish shell: one ``complete`` line for each command, option and built-in SPEC."""

from __future__ import annotations

import argparse
from pathlib import Path

from dag_hesse._cli.spec import BUILT_IN


def script(commands: dict[str, argparse.ArgumentParser], helps: dict[str, str], top: argparse.ArgumentParser) -> str:
    """The whole script; ``helps`` says what each command does."""
    lines = ["complete -c dag-hesse -f"]
    lines += [_line("__fish_use_subcommand", f"-a {name}", helps.get(name, "")) for name in commands]
    lines += [line for action in top._actions for line in _of_option("__fish_use_subcommand", action)]
    for name, command in commands.items():
        inside = f"__fish_seen_subcommand_from {name}"
        for action in command._actions:
            if action.option_strings:
                lines += _of_option(inside, action)
            elif action.choices or action.metavar == "SPEC":
                lines.append(_line(inside, f"-a {_quoted(' '.join(map(str, action.choices or BUILT_IN)))}", ""))
            elif action.type is Path:
                lines.append(_line(inside, "-F", ""))
    return "\n".join(lines) + "\n"


def _of_option(condition: str, action: argparse.Action) -> list[str]:
    """An option, and what may follow it: one of its choices, a file, or anything."""
    found = []
    for option in action.option_strings:
        if option.startswith("--"):
            says = f"-l {option[2:]}"
            if action.choices:
                says += f" -x -a {_quoted(' '.join(map(str, action.choices)))}"
            elif action.nargs != 0:
                says += " -r -F" if action.type is Path or action.metavar == "FILE" else " -x"
            found.append(_line(condition, says, action.help or "", action))
    return found


def _line(condition: str, says: str, help: str, action: argparse.Action | None = None) -> str:
    default = "" if action is None else str(action.default)
    told = help.replace("%(default)s", default).replace("%%", "%").removesuffix(".")
    return f"complete -c dag-hesse -n {_quoted(condition)} {says}" + (f" -d {_quoted(told)}" if told else "")


def _quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
