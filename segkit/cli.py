"""The command ``segkit VERB``; every verb imports what it needs when it is called."""

from __future__ import annotations

import sys
from collections.abc import Callable

VERBS: dict[str, tuple[str, str]] = {
    "train": ("segkit.train:main", "train a model (the same as python train.py)"),
    "check": ("segkit.commands.check:main", "proof before the GPU hour: the data, and one real step of everything"),
    "stats": ("segkit.commands.stats:main", "label pixels of every class, and the margins that follow"),
    "evaluate": ("segkit.commands.evaluate:main", "score a trained run on any split, with any inference"),
    "predict": ("segkit.commands.predict:main", "label images and overlays for any pictures"),
    "submit": ("segkit.commands.submit:main", "predictions in the format of a benchmark's server"),
    "export": ("segkit.commands.export:main", "a trained model as ONNX or torch.export"),
    "compare": ("segkit.commands.compare:main", "compare finished runs: one offline HTML file, and tables"),
    "plot": ("segkit.commands.plot:main", "the curves of the margin losses as a picture"),
    "sample": ("segkit.commands.sample:main", "a small synthetic data set in the layout of a real one"),
    "replay": ("segkit.commands.replay:main", "repeat the step of a failure bundle"),
}
"""Verb -> (module:function, one line of help). The function is called with the remaining arguments in sys.argv."""


def usage() -> str:
    """The text of ``segkit --help``."""
    width = max(map(len, VERBS))
    lines = [f"  segkit {verb:{width}}  {text}" for verb, (_, text) in VERBS.items()]
    return "\n".join(["usage: segkit VERB ...", "", *lines, "", "segkit VERB --help explains one of them"])


def load(verb: str) -> Callable[[], None]:
    """The function behind ``verb``."""
    from importlib import import_module

    module, _, name = VERBS[verb][0].partition(":")
    return getattr(import_module(module), name)


def main() -> None:
    """Entry point of the command ``segkit``."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        sys.exit(0 if arguments else 2)
    verb = arguments[0]
    if verb == "--version":
        from segkit import __version__

        print(__version__)
        return
    if verb not in VERBS:
        import difflib

        close = difflib.get_close_matches(verb, VERBS, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        print(f"error: there is no verb {verb!r}: {hint}the verbs are {', '.join(VERBS)}", file=sys.stderr)
        sys.exit(2)
    sys.argv = [f"segkit {verb}", *arguments[1:]]
    load(verb)()


if __name__ == "__main__":
    main()
