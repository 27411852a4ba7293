"""``segkit completion``: what a shell needs to complete verbs and options."""

from __future__ import annotations

import shlex
from argparse import ArgumentParser
from collections.abc import Sequence
from importlib import import_module

from segkit.cli import VERBS
from segkit.commands.options import verb_parser
from segkit.progress import show

BASH = """_segkit() {{
  local words="{verbs}"
  if [ "$COMP_CWORD" -gt 1 ]; then
    case "${{COMP_WORDS[1]}}" in
{cases}
      *) words="" ;;
    esac
  fi
  COMPREPLY=($(compgen -W "$words" -- "${{COMP_WORDS[COMP_CWORD]}}"))
}}
complete -o default -F _segkit segkit"""


def parser() -> ArgumentParser:
    """Return the parser of the verb's arguments."""
    verb = verb_parser(
        "completion",
        'Print a script that completes verbs, options and files. In ~/.bashrc: eval "$(segkit completion bash)"; in '
        "~/.zshrc the same with zsh; for fish: segkit completion fish | source",
        example="bash",
    )
    verb.add_argument("shell", choices=["bash", "zsh", "fish"], help="the shell that reads the script")
    return verb


def run(argv: Sequence[str]) -> None:
    """Print the script."""
    shell = parser().parse_args(argv).shell
    found = {verb: options(verb) for verb in VERBS if verb != "train"}  # whose arguments are Hydra's
    if shell == "fish":
        for verb, text in VERBS.items():
            show(f"complete -c segkit -n __fish_use_subcommand -f -a {verb} -d {shlex.quote(text)}")
        for verb, flags in found.items():
            for flag, text in flags.items():
                name = flag.removeprefix("--")
                show(f"complete -c segkit -n '__fish_seen_subcommand_from {verb}' -l {name} -d {shlex.quote(text)}")
        return
    if shell == "zsh":
        show("autoload -U +X bashcompinit && bashcompinit")
    cases = "\n".join(f'      {verb}) words="{" ".join(flags)}" ;;' for verb, flags in found.items())
    for line in BASH.format(verbs=" ".join(VERBS), cases=cases).splitlines():
        show(line)


def options(verb: str) -> dict[str, str]:
    """Return the long options of ``verb`` with their help."""
    actions = import_module(f"segkit.commands.{verb}").parser()._actions
    return {name: action.help or "" for action in actions for name in action.option_strings if name.startswith("--")}
