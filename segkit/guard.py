"""One door for all commands: an exception that the user can mend becomes a sentence and an exit code."""

from __future__ import annotations

import difflib
import errno
import os
import re
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from segkit import memory
from segkit.errors import (
    InputError,
    Interrupted,
    NonFiniteLoss,
    OutOfMemory,
    did_you_mean,
    first_line,
    is_of_a_file,
    raised,
)
from segkit.progress import for_terminal, shortened, show
from segkit.runtime import kept_random, let_waiting_threads_sleep, usual_torch
from segkit.training import ranks

OWN = (InputError, Interrupted, NonFiniteLoss, OutOfMemory)
"""What has its sentence"""


def guarded(command: Callable[[], Any], *, verb: str = "train") -> Any:
    """Call ``command`` (of ``verb``); an exception that the user can mend becomes one sentence and an exit code."""
    warnings.formatwarning = lambda message, category, *rest: for_terminal(f"warning: {message}") + "\n"
    threading.excepthook = _leave_os_errors
    os.environ.pop("MPLBACKEND", None)  # pictures are drawn to files; one that matplotlib does not know ends its import
    ranks.quiet_others()
    with guard(verb=verb):
        try:
            with guard(verb=verb):
                return command()
        finally:
            sys.stdout.flush()  # an error of its disk is a sentence here, and none when Python does it


def _leave_os_errors(failed: threading.ExceptHookArgs) -> None:
    """Show no traceback of a thread that a disk fails, as TensorBoard's: who asks it to write again gets the error."""
    if not isinstance(failed.exc_value, OSError):
        threading.__excepthook__(failed)


@contextmanager
def guard(*, passes: bool = False, verb: str = "train") -> Iterator[None]:
    """End the process with one sentence and an exit code for an exception that the user can mend.

    With ``passes`` every exception goes through to the caller.
    """
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if not passes and not isinstance(error, (*OWN, OSError)) and (ended := _ended_amid(error)):
            sys.exit(ended)
        sentence, code = (None, 1) if passes else explain(error, verb=verb)
        if sentence is None or os.environ.get("SEGKIT_DEBUG") == "1":
            raise
        sentence = shortened(sentence)
        if ranks.speaks(sentence):
            show(sentence if isinstance(error, Interrupted) else f"error: {sentence}", error=True)
        sys.exit(code)


def _ended_amid(error: BaseException) -> Any:
    """The exit code of a signal that came amid the work of a library, if ``error`` is what became of that; else 0."""
    while error.__context__ is not None:
        error = error.__context__
        if isinstance(error, KeyboardInterrupt | SystemExit):
            return getattr(error, "code", 130)
    return 0


@contextmanager
def sentences(*, verb: str = "train") -> Iterator[None]:
    """Raise InputError, or OutOfMemory, with the sentence of :func:`explain` in place of another exception that the
    user can mend."""
    try:
        yield
    except OWN:
        raise
    except Exception as error:
        sentence, code = explain(error, verb=verb)
        if sentence is None:
            raise
        raise (OutOfMemory if code == OutOfMemory.exit_code else InputError)(sentence) from None


@contextmanager
def call(*, verb: str = "train") -> Iterator[None]:
    """Around a call from Python: :func:`sentences`, and afterwards the settings of the process are what they were.

    These are the random states of torch on the CPU, numpy and Python, torch's determinism, the limits of pixels, and
    what is trusted. What else of torch is set (types, devices, gradients, autocast) changes nothing within it.
    """
    let_waiting_threads_sleep()
    import torch
    from PIL import Image

    from segkit.config import targets
    from segkit.data import decode

    mode, benchmark = torch.get_deterministic_debug_mode(), torch.backends.cudnn.benchmark
    limit, most, trusted = decode.pixel_limit(), Image.MAX_IMAGE_PIXELS, set(targets._trusted)
    known = set(sys.path)
    decode.set_pixel_limit(limit)  # also that of Pillow
    try:
        with usual_torch(), kept_random(), sentences(verb=verb):
            yield
    finally:
        if torch.get_deterministic_debug_mode() != mode:  # to set it loads a compiler: seconds
            torch.set_deterministic_debug_mode(mode)
        torch.backends.cudnn.benchmark = benchmark
        decode.set_pixel_limit(limit)
        Image.MAX_IMAGE_PIXELS = most
        targets._trusted.intersection_update(trusted)
        sys.path[:] = [place for place in sys.path if place in known or place not in targets.places]


def explain(error: BaseException, *, verb: str = "train") -> tuple[str | None, int]:
    """One sentence for ``error`` and the exit code; None for a defect of segkit, which deserves its traceback.

    ``verb``: what was called, whose options the advice names.
    """
    if isinstance(error, Interrupted):
        return (
            f"{error}; the state is saved: run the same command with the same hydra.run.dir to go on",
            error.exit_code,
        )
    if isinstance(error, InputError | NonFiniteLoss | OutOfMemory):
        return with_options(str(error), verb), error.exit_code
    if ranks.is_lost_peer(error):
        return "another process of this run has ended; its own message says why", 1
    if memory.is_out_of_memory(error):
        return f"out of memory ({first_line(error)}): {VERB_ADVICE.get(verb, MEMORY_ADVICE)}", OutOfMemory.exit_code
    if isinstance(error, ImportError | OSError) and re.search(r"\.so[.\d]*: ", str(error)):
        return (
            f"a library cannot be loaded ({first_line(error)}): allow more memory where `ulimit -v` limits it, or "
            "install what is missing"
        ), InputError.exit_code
    if isinstance(error, NotImplementedError | TypeError) and "MPS" in str(error):
        return (
            f"device=mps cannot compute this ({first_line(error)}): set PYTORCH_ENABLE_MPS_FALLBACK=1 in the "
            "environment, which computes such parts on the CPU, or set device=cpu"
        ), InputError.exit_code
    calls = [frame.f_locals for frame, _ in traceback.walk_tb(error.__traceback__) if frame.f_code.co_name == "forward"]
    call = next((call for call in calls if hasattr(call.get("self"), "takes")), None)  # of the Segmenter, if it failed
    if call and not call["self"].takes(call["images"].shape):
        return (
            f"the model cannot compute images of {tuple(call['images'].shape)} ({raised(error)}): give it images of "
            "other sizes (windows, as of --slide HxW), or choose another model"
        ), InputError.exit_code
    if verb in ("train", "check") and type(error).__module__.startswith(("torch._inductor.", "torch._dynamo.")):
        reason = " ".join(first_line(error).split())
        text = (
            f"the model cannot be compiled ({type(error).__name__}: {reason}): set compile=false, or mend the compiler"
        )
        return text, InputError.exit_code
    from hydra.errors import HydraException  # not before: no memory may be left
    from omegaconf.errors import OmegaConfBaseException

    if isinstance(error, HydraException | OmegaConfBaseException):
        return _explain_hydra(error), InputError.exit_code
    if (option := local_in(error, "load_config", "config_path")) and isinstance(option, str):
        return f"the option {option} cannot be read ({first_line(error)}): mend its YAML file", InputError.exit_code
    if override := getattr(local_in(error, "_apply_overrides_to_config", "override"), "input_line", None):
        return (
            f"the override {override!r} cannot be applied: something in its key is null, a list or one value, and so "
            "has no keys; give a list as a whole, and to a phase an option, as +loss@schedule.PHASE.loss=NAME, whose "
            "keys can then be set"
        ), InputError.exit_code
    if isinstance(error, ValueError) and "Config group override must be" in str(error):
        text = "a group takes the name of one of its options: `python train.py --help` lists the groups"
        return text, InputError.exit_code
    if _is_of_own_code(error):
        return f"code of your own fails ({raised(error)}): mend it", InputError.exit_code
    if isinstance(error, OSError):
        return _explain_os_error(error), InputError.exit_code
    if isinstance(error, ValueError) and str(error).startswith("embedded null"):
        return "a path has a NUL byte in it, which no name of a file has: correct it", InputError.exit_code
    if isinstance(error, RuntimeError) and (text := str(error)).startswith("Symlink loop from "):  # of pathlib
        return f"{text.removeprefix('Symlink loop from ')} is a link that leads back to itself: give another place", 2
    if _is_of_hydra(error):
        reason = f"{type(error).__name__}: {first_line(error)}"
        return f"Hydra cannot use the command line ({reason}): correct its keys that begin with hydra", 2
    return None, 1


FEWER_AT_ONCE = "accumulate=2 (or twice what it is: half as many images at once), or a smaller dataset.crop"
MEMORY_ADVICE = f"set grad_checkpointing=light (or mixed, or true: less memory still), or {FEWER_AT_ONCE}"
_WINDOW = "give smaller --scales, or a window, --slide 512x512"
VERB_ADVICE = {
    "evaluate": f"{_WINDOW}, or a smaller --batch-size",
    "predict": _WINDOW,
    "submit": _WINDOW,
    "export": "give --format hub, which traces nothing, or free some memory",
    "check": "set workers=0, or look at fewer images, --sample 100",
    "compare": "name fewer runs, or give fewer --pictures",
    "stats": "set workers=0, or leave --plot out",
    "sample": "give a smaller --scale",
}

_TRUST, _ROOT = {"trust=[mypackage]": "--trust=mypackage"}, {"dataset.root": "--root"}
_DEVICE, _PIXELS = {"device=": "--device="}, {"max_pixels": "--max-pixels"}
_SPLIT = {"dataset.train_split and dataset.val_split to": "--split to one of"}
VERB_OPTIONS = {
    "evaluate": {**_TRUST, **_ROOT, **_SPLIT, **_DEVICE, **_PIXELS, "workers=": "--workers="},
    "predict": {**_TRUST, **_DEVICE, **_PIXELS},
    "submit": {**_TRUST, **_ROOT, **_SPLIT, **_DEVICE, **_PIXELS, "workers=": "--workers="},
    "export": {**_TRUST, **_ROOT},
    "compare": {**_TRUST, **_ROOT, **_DEVICE},
    "replay": {**_TRUST, **_DEVICE},
    "stats": _SPLIT,
}
"""Keys in advice that a verb takes by an option"""


def with_options(text: str, verb: str) -> str:
    """Return the advice ``text`` with the options of ``verb`` in place of keys."""
    for key, option in VERB_OPTIONS.get(verb, {}).items():
        text = re.sub(rf"\b(set|check) {re.escape(key)}", rf"\1 {option}", text)
    return text


def _is_of_own_code(error: BaseException) -> bool:
    """True if ``error`` came through a package that ``trust`` names; not for one of a file, which says which."""
    from segkit.config import targets

    modules = [str(frame.f_globals.get("__name__")) for frame, _ in traceback.walk_tb(error.__traceback__)]
    return not is_of_a_file(error) and any(name.partition(".")[0] in targets._trusted for name in modules)


def _is_of_hydra(error: BaseException) -> bool:
    """True if ``error`` came out of Hydra, and not out of what Hydra called."""
    modules = [str(frame.f_globals.get("__name__")) for frame, _ in traceback.walk_tb(error.__traceback__)]
    first = next((i for i, name in enumerate(modules) if name.startswith("hydra.")), len(modules))
    return first < len(modules) and not any(name.startswith("segkit") for name in modules[first:])


def local_in(error: BaseException, function: str, name: str) -> Any:
    """The variable ``name`` of the first ``function`` that ``error`` came through, for Hydra does not say it; or None.

    The option that could not be read, for example, or the override that failed with an exception not OmegaConf's.
    """
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if frame.f_code.co_name == function:
            return frame.f_locals.get(name)
    return None


def _explain_os_error(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"no space is left for {error.filename or 'a file'} ({error.strerror}): free some, or choose "
            "a larger disk (hydra.run.dir and cache_dir, or the --output of a verb), then run the same command again"
        )
    if error.filename is not None:
        return (
            f"{os.fsdecode(error.filename)} cannot be used ({error.strerror}): mend it, or give another path in "
            "its place (of results: hydra.run.dir=DIR, or the --output of a verb)"
        )
    try:
        os.getcwd()
    except FileNotFoundError:
        return "the folder that this shell is in is not there any more: go to one that is, `cd DIR`"
    if error.errno is None:
        return str(error)
    return f"a file cannot be read or written ({error}): look at the disks of the data, hydra.run.dir and --output"


def _explain_hydra(error: BaseException) -> str:
    """Hydra's and OmegaConf's messages as one sentence that names the key and what is allowed."""
    from omegaconf.errors import MissingMandatoryValue

    from segkit.config.compose import reason_of

    text = str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    cause = error.__cause__ or error.__context__
    if text.startswith(ours := "InputError raised while resolving interpolation: "):
        return lines[0].removeprefix(ours)
    option = re.search(r"Could not (?:find|load) '([^']+)'", text)
    if option:
        return _explain_option(option.group(1), text)
    if advice := _explain_prefix(text):
        return advice
    key = re.match(r"Could not override '([^']+)'", text)
    if key:
        parent, inner = (getattr(cause, name, None) for name in ("parent_node", "full_key"))
        within = str(inner).startswith(f"{key[1]}.")  # of a mapping that was given as the value
        return _explain_key(str(inner) if within else key[1], parent)
    if text.startswith("Error parsing override") and "missing EQUAL" in text:
        return f"{lines[0].replace('Error parsing', 'the', 1)} cannot be read: write KEY=VALUE, for example seed=1"
    if text.startswith("BasicSweeper does not support"):
        return (
            "a grid has no intervals: write values with commas, or search, "
            "-m sweep=search '+sweep.space.KEY={low:1,high:2}'"
        )
    if in_option := re.match(r"In '([^']+)': \w+ raised while composing", text):
        place = next((f"{line.removeprefix('full_key: ')}: " for line in lines if line.startswith("full_key: ")), "")
        reason = f"{place}{lines[min(1, len(lines) - 1)]}"
        if place == f"{in_option[1].partition('/')[0]}: ":  # an overlay, whose keys belong to the run
            return f"the option {in_option[1]} cannot be used ({reason}): begin its file with # @package _global_"
        return f"the option {in_option[1]} cannot be used ({reason}): mend its YAML file, or the place behind @"
    if text.startswith("Additional config directory"):
        return f"--config-dir names {text.split(chr(39))[1]}, which is no folder: mend the path"
    if text.startswith("Error merging override") and cause is not None:
        reason = first_line(cause)
        if "is not a ListConfig" in reason:
            reason = "write a list in brackets, as KEY=[VALUE,VALUE]"
        elif "is not a subclass of PhaseConfig" in reason:
            phases = ", ".join(local_in(error, "_apply_overrides_to_config", "cfg").schedule)
            reason = (
                f"set the keys of a phase that is there ({phases}), and put a further phase into an option of schedule"
            )
        elif "does not support deletion" in reason:
            reason = "every run has this key: set it to another value"
        return f"{lines[0].removeprefix('Error merging override ')} is not allowed: {reason[:1].lower() + reason[1:]}"
    if isinstance(error, MissingMandatoryValue):
        return reason_of(error)
    reason = "; ".join(lines[:2]) or first_line(cause or error)
    return f"{reason} (`python train.py --cfg job` shows the configuration)"


def _explain_prefix(text: str) -> str | None:
    """Hydra's ``text`` about a + that is missing or too much, as a sentence; None for another text."""
    if there := re.match(r"Could not append to config. An item is already at '([^']+)'", text):
        return f"there is a key {there[1]} already: write {there[1]}=VALUE, without +"
    if group := re.match(r"Multiple values for (\S+)\. .*'override \S+: (\S+)'", text):
        return (
            f"{group[1]} is chosen already: write {group[1]}={group[2]} without +, or in a list of defaults 'override "
            f"/{group[1]}: {group[2]}'"
        )
    if forced := re.match(r"force-add of config groups is not supported: '\++(.+)'", text):
        return f"an option of a group is chosen without ++: write {forced[1]}"
    if missing := re.search(r"To append to your default list use (\+\S+@(\S*)=\S+)", text):
        return f"no option is chosen for {missing[2]} yet: write {missing[1]}"
    return None


def _explain_key(key: str, parent: Any) -> str:
    """``parent``: the node of OmegaConf in which a part of the dotted ``key`` was not found, or None."""
    if key.startswith("sweep.space."):
        return (
            f"there is no key {key} yet: write '+{key}={{low:1,high:10}}', after '~{key}' if it replaces another range"
        )
    prefix = parent._get_full_key(None) if parent is not None else ""
    name = key.removeprefix(f"{prefix}.").partition(".")[0]
    known = [str(item) for item in parent if item != "hydra"] if parent is not None else []
    deeper = _places(parent, name, prefix)
    close = [f"{prefix}.{item}".lstrip(".") for item in difflib.get_close_matches(name, known, n=1)]
    elsewhere = _places(parent._get_root(), name, "") if parent is not None else []
    hint = f": {prefix or 'a run'} has {', '.join(known)}" if known else ""
    if meant := deeper or close or elsewhere:
        hint = f": did you mean {' or '.join(meant[:3])}?"
    return f"there is no key {key}{hint} (`python train.py --cfg job` shows all keys)"


def _places(node: Any, name: str, prefix: str) -> list[str]:
    """Dotted keys of what is called ``name`` somewhere within ``node``, itself at ``prefix``; the shortest first."""
    found = []
    for key in node if isinstance(node, Mapping) else ():
        place = f"{prefix}.{key}".lstrip(".")
        if key == name:
            found.append(place)
        if place != "hydra":
            found += _places(node._get_node(key), name, place)
    return sorted(found, key=lambda place: (".recipe." in place, place.count(".")))


def _explain_option(name: str, text: str) -> str:
    group, _, option = name.rpartition("/") if name.startswith("hydra/") else name.partition("/")
    options = [line.strip() for line in text.splitlines() if line.startswith("\t")]
    options = [item for item in options if not item.startswith("provider=")]
    hint = did_you_mean(option, options, before=f"{group}=")
    listed = f"the options are {', '.join(options)}" if options else "`python train.py --help` lists the options"
    return f"{group}={option} is not an option: {hint}{listed}"
