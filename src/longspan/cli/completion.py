"""``longspan completion SHELL``: a script that completes commands, options, and values if there are few.

The words come from the schema, so a new key is completed too when the script has been printed again.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any, Literal, get_args, get_origin

from longspan.cli.launch import OPTIONS as LAUNCH_OPTIONS
from longspan.config.dialects.external import refuses
from longspan.config.dialects.table import EXTERNAL_NAMES
from longspan.config.model import CP_COMM_TYPES
from longspan.config.schema import Key, keys
from longspan.errors import UserError, did_you_mean

USAGE = """\
usage: longspan completion bash|zsh|fish

Prints a script that completes commands, options and values:
  bash   echo 'eval "$(longspan completion bash)"' >> ~/.bashrc
  zsh    echo 'eval "$(longspan completion zsh)"' >> ~/.zshrc     (after compinit)
  fish   longspan completion fish > ~/.config/fish/completions/longspan.fish
"""
#: TAKE_KEYS: the commands that accept any key as an option; LAUNCH: the commands that start processes
TAKE_KEYS = (
    "validate",
    "config",
    "train",
    "pretrain",
    "eval",
    "verify",
    "profile",
    "layout",
    "plan",
    "prepare",
    "env",
)
LAUNCH = ("train", "pretrain", "eval", "verify", "profile")
SHELLS = ("bash", "zsh", "fish")


def run(arguments: Sequence[str]) -> int:
    if "--help" in arguments or "-h" in arguments:
        print(USAGE)
        return 0
    if len(arguments) != 1 or arguments[0] not in SHELLS:
        given = " ".join(arguments)
        near = did_you_mean(given, SHELLS) if given else ""
        raise UserError(f"longspan completion {given or '(nothing)'}: one of {', '.join(SHELLS)}.{near}")
    print({"bash": bash, "zsh": zsh, "fish": fish}[arguments[0]]())
    return 0


def commands() -> dict[str, str]:
    """Command -> its description."""
    from longspan.cli.main import COMMANDS

    return {name: text for name, (_, text) in COMMANDS.items()}


def own_options(command: str) -> list[str]:
    """A command's own options, with the launcher's options."""
    from longspan.cli.main import COMMANDS

    module = importlib.import_module(COMMANDS[command][0])
    options = [*getattr(module, "OPTIONS", ()), *sorted(getattr(module, "FILE_OPTIONS", ()))]
    if command in LAUNCH:
        options += LAUNCH_OPTIONS
    return [*(o for o in dict.fromkeys(options) if o != "--worker"), "--help"]


def key_options() -> dict[str, Key]:
    """Option of a key (under each of its names) or switch -> the key."""
    found: dict[str, Key] = {}
    for k in keys():
        for option in ("--" + k.name.replace("_", "-"), k.flag, *k.switches):
            found.setdefault(option, k)
        if bool in (k.annotation, *get_args(k.annotation)):
            found.setdefault("--no-" + k.name.replace("_", "-"), k)
    return found


def other_options() -> list[str]:
    """Names of Megatron-LM and axolotl that are accepted and are not keys; refused names are left out."""
    return [
        "--" + n.replace("_", "-") for n, name in EXTERNAL_NAMES.items() if "." not in n and not refuses(name)
    ]


def choices(k: Key) -> list[str]:
    """The values of a key, if there are few."""
    if k.name == "cp_comm_type":
        return list(CP_COMM_TYPES)
    found: list[Any] = []
    for member in (k.annotation, *get_args(k.annotation)):
        if get_origin(member) is Literal:
            found += get_args(member)
        elif member is bool:
            found += ["true", "false"]
    return [str(value) for value in dict.fromkeys(found) if value is not None]


def values() -> dict[tuple[str, ...], list[str]]:
    """Options -> their values, if there are few."""
    found: dict[tuple[str, ...], list[str]] = {}
    for k in keys():
        spellings = dict.fromkeys(["--" + k.name.replace("_", "-"), k.flag])
        if chosen := choices(k):
            found[tuple(spellings)] = chosen
    return found


def arguments_of() -> dict[str, list[str]]:
    """Command -> its arguments other than options and files."""
    from longspan.cli.init import examples

    return {"init": list(examples()), "completion": list(SHELLS)}


def bash() -> str:
    cases = "\n".join(f"    {'|'.join(o)}) words='{' '.join(v)}' ;;" for o, v in values().items())
    own = "\n".join(f"      {name}) words='{' '.join(own_options(name))}' ;;" for name in commands())
    first = "\n".join(f"      {name}) words='{' '.join(w)}' ;;" for name, w in arguments_of().items())
    return f"""\
# longspan for bash: eval "$(longspan completion bash)"
_longspan() {{
  local cur="${{COMP_WORDS[COMP_CWORD]}}" prev="${{COMP_WORDS[COMP_CWORD-1]}}" words=''
  local keys='{" ".join([*key_options(), *other_options()])}'
  case "$prev" in
{cases}
  esac
  if [ "$COMP_CWORD" -eq 1 ]; then
    words='{" ".join(commands())}'
  elif [ "${{cur#-}}" != "$cur" ]; then
    case "${{COMP_WORDS[1]}}" in
{own}
    esac
    case "${{COMP_WORDS[1]}}" in
      {"|".join(TAKE_KEYS)}) words="$words $keys" ;;
    esac
  elif [ -z "$words" ]; then
    case "${{COMP_WORDS[1]}}" in
{first}
    esac
  fi
  COMPREPLY=($(compgen -W "$words" -- "$cur"))
}}
complete -o default -F _longspan longspan"""


def zsh() -> str:
    cases = "\n".join(f"    {'|'.join(o)}) compadd -- {' '.join(v)}; return ;;" for o, v in values().items())
    own = "\n".join(f"    {name}) own=({' '.join(own_options(name))}) ;;" for name in commands())
    first = "\n".join(f"      {name}) compadd -- {' '.join(w)} ;;" for name, w in arguments_of().items())
    described = "\n".join(
        f"    {_quote(f'{name}:{text}'.replace(': ', ' - '))}" for name, text in commands().items()
    )
    return f"""\
#compdef longspan
# longspan for zsh: eval "$(longspan completion zsh)", after compinit
_longspan() {{
  local -a own keys all
  keys=({" ".join([*key_options(), *other_options()])})
  all=(
{described}
  )
  if (( CURRENT == 2 )); then
    _describe command all
    return
  fi
  case ${{words[CURRENT-1]}} in
{cases}
  esac
  if [[ ${{words[CURRENT]}} == -* ]]; then
    case ${{words[2]}} in
{own}
    esac
    case ${{words[2]}} in
      {"|".join(TAKE_KEYS)}) own+=($keys) ;;
    esac
    compadd -- $own
  else
    case ${{words[2]}} in
{first}
      *) _files ;;
    esac
  fi
}}
compdef _longspan longspan"""


def fish() -> str:
    lines = ["# longspan for fish: longspan completion fish > ~/.config/fish/completions/longspan.fish"]
    for name, text in commands().items():
        lines.append(f"complete -c longspan -n __fish_use_subcommand -f -a {name} -d {_quote(text)}")
    for name in commands():
        condition = f"-n '__fish_seen_subcommand_from {name}'"
        lines += [f"complete -c longspan {condition} -l {option[2:]}" for option in own_options(name)]
    for name, words in arguments_of().items():
        lines.append(
            f"complete -c longspan -n '__fish_seen_subcommand_from {name}' -f -a {_quote(' '.join(words))}"
        )
    condition = f"-n '__fish_seen_subcommand_from {' '.join(TAKE_KEYS)}'"
    takes = {option: chosen for options, chosen in values().items() for option in options}
    for option, k in key_options().items():
        shown = f" -x -a {_quote(' '.join(takes[option]))}" if option in takes else ""
        lines.append(f"complete -c longspan {condition} -l {option[2:]}{shown} -d {_quote(k.text)}")
    lines += [f"complete -c longspan {condition} -l {option[2:]}" for option in other_options()]
    return "\n".join(lines)


def _quote(text: str) -> str:
    """Text in single quotes, valid in all three shells."""
    return "'" + text.replace("'", "") + "'"
