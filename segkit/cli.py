"""The command ``segkit VERB``; every verb imports what it needs when it is called."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import import_module

try:
    from segkit import __version__
    from segkit.errors import InputError, did_you_mean
    from segkit.guard import guarded
    from segkit.memory import keep_freed
    from segkit.progress import need_no_reader
    from segkit.runtime import let_waiting_threads_sleep, tidied_up_when_ended
except KeyboardInterrupt:  # Ctrl-C so early that nothing is there to handle it
    sys.exit(130)

VERBS = {
    "train": "train a model (the same as python train.py)",
    "check": "proof before the GPU hour: the data, and some real steps of every phase",
    "browse": "training crops as the trainer sees them: one offline HTML file",
    "stats": "label pixels of every class, and the margins that follow",
    "evaluate": "score a trained run on any split, with any inference",
    "predict": "label images and overlays for any pictures",
    "submit": "predictions in the format of a benchmark's server",
    "export": "a trained model as ONNX, torch.export, safetensors, or a folder with its card",
    "compare": "compare finished runs: one offline HTML file, and tables",
    "plot": "the curves of the margin losses as a picture",
    "models": "encoders, their size, and where their weights come from",
    "sample": "a small synthetic data set in the layout of a real one",
    "completion": "a script that completes verbs and options in bash, zsh or fish",
    "replay": "repeat the step of a failure bundle",
}
"""Verb -> one line of help. ``run(argv)`` of the module ``segkit.commands.VERB`` does the work."""


def usage() -> str:
    """The text of ``segkit --help``."""
    width = max(map(len, VERBS))
    lines = [f"  segkit {verb:{width}}  {text}" for verb, text in VERBS.items()]
    return "\n".join(["usage: segkit VERB ...", "", *lines, "", "segkit VERB --help explains one, segkit --version"])


def verb_function(verb: str) -> Callable[[Sequence[str]], None]:
    """Return the function of ``verb``, which takes the arguments behind it."""
    return import_module("segkit.launch" if verb == "train" else f"segkit.commands.{verb}").run


def main() -> None:
    """Entry point of the command ``segkit``."""
    let_waiting_threads_sleep()
    keep_freed()
    need_no_reader()
    verb, *argv = sys.argv[1:] or ["--help"]
    with tidied_up_when_ended():
        guarded(lambda: call(verb, argv), verb=verb)
    if len(sys.argv) == 1:
        sys.exit(InputError.exit_code)


def call(verb: str, argv: Sequence[str]) -> None:
    """Do ``verb``, or show the usage or the version."""
    if verb in VERBS:
        verb_function(verb)(argv)
    elif verb == "--version":
        print(__version__)
    elif verb in ("-h", "--help"):
        print(usage())
    else:
        hint = did_you_mean(verb, VERBS)
        raise InputError(f"there is no verb {verb!r}: {hint}the verbs are {', '.join(VERBS)}")


if __name__ == "__main__":
    main()
