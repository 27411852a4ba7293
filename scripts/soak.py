"""Kill a small run at random moments, resume it, compare hashes; then train 2,000 steps and watch for leaks.

    python scripts/soak.py [--kills 30] [--steps 2000] [--cases 0] [--seed 0]

``--cases N`` also tries every case of ``soak_cases.py`` N times: two processes in one folder, signals to the group
while it evaluates or counts labels, a closed terminal, a killed torchrun, a flipped bit.

Every run is a process of its own (forked from one that has the imports behind it, which saves seconds a start) and does
what ``python train.py`` does. Half of the kills wait for a checkpoint to be half written. Prints a line a run and ends
with exit code 1 if a byte differs, or if something leaks.
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

SMALL = (
    "dataset.reader.num_images=10",
    "dataset.reader.size=[64,64]",
    "dataset.crop=[32,32]",
    "batch_size=4",
    "loss=cross_entropy_dice",
    "schedule=pretrain_finetune",
    *(f"schedule.{phase}.{key}" for phase in ("pretrain", "finetune") for key in ("epochs=null", "steps=7")),
    "evaluation.every_epochs=null",
    "evaluation.every_steps=3",
    "evaluation.max_images=3",
    "evaluation.pictures=0",
    "log_every=2",
    "checkpoint_every=1",
    "determinism=strict",
    "device=cpu",
    "model=deeplabv3plus_tiny",
    "model.encoder=tu-test_resnet",
    "model.decoder_channels=16",
)
"""A run of two phases with 2 steps an epoch, a checkpoint every step, and an evaluation now and then."""

VARIANTS = {
    "1 worker": ("workers=1",),
    "4 workers, accumulation, moving average, fp16": (
        "workers=4",
        "accumulate=2",
        "ema_decay=0.9",
        "precision=fp16",
        "clip_norm=1.0",
    ),
}

COMPARED = (
    "metrics.jsonl",
    "results.json",
    "pretrain/metrics.jsonl",
    "pretrain/results.json",
    "finetune/metrics.jsonl",
)
PRELOADED = [
    "segkit.run.pipeline",
    "segkit.check.rehearsal",
    "segkit.launch",
    "segkit.data.augment",
    "segkit.synthetic.dataset",
    "hydra",
    "torch.utils.tensorboard",
    "timm",
    "torch.distributed.run",
]


def _train(overrides: Sequence[str], log: str, torchrun: Sequence[str], folder: str | None) -> None:
    """In the new process: what ``python train.py OVERRIDES`` does, or ``torchrun TORCHRUN train.py OVERRIDES``."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.setsid()
    if folder is not None:
        os.chdir(folder)
    if not torchrun:
        _rank(("train.py", *overrides), {})
        return
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

    subprocess_handler.SubprocessHandler._popen = _fork  # type: ignore[method-assign, assignment]
    run.main([*torchrun, "train.py", *overrides])


def _fork(handler: object, command: Sequence[str], environment: dict[str, str]) -> object:
    """In the process of torchrun: fork the rank that runs ``command`` instead of starting it anew."""
    process = multiprocessing.get_context("fork").Process(target=_rank, args=(command, environment, True))
    process.start()
    return process._popen  # type: ignore[attr-defined]  # has what torchrun uses of subprocess.Popen


def _rank(command: Sequence[str], environment: dict[str, str], is_forked: bool = False) -> None:
    """Train as ``command`` says, which ends with ``train.py OVERRIDES``."""
    if is_forked:
        os.setsid()
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):  # which torchrun handles
            signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell ignores for what runs in its background
    os.environ.update(environment)
    sys.argv = [*command[list(command).index("train.py") :]]
    from segkit.launch import main
    from segkit.training import ranks

    ranks.PARENT = os.getppid()  # which it took of the process that imported it
    main()


def start(
    overrides: Sequence[str], log: Path, *, torchrun: Sequence[str] = (), folder: Path | None = None
) -> multiprocessing.process.BaseProcess:
    """Start a run, in the working directory ``folder``, by torchrun if it has options for that.

    Its output goes to ``log``, its process group has its own id, and every rank of torchrun has one too.
    """
    arguments = (list(overrides), str(log), list(torchrun), None if folder is None else str(folder))
    process = _context().Process(target=_train, args=arguments)
    process.start()
    return process


def warm_up() -> None:
    """Start the process that all runs fork from; it takes seconds, which belong to no run."""
    process = _context().Process(target=int)
    process.start()
    process.join()


def _context() -> multiprocessing.context.ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def hashes(folder: Path) -> dict[str, str]:
    """What two equal runs must share: records and results byte by byte, and every tensor of the last checkpoints."""
    import torch

    found = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in COMPARED}
    for phase in ("pretrain", "finetune"):
        for name in ("last.pt", "best.pt"):
            state = torch.load(folder / phase / "checkpoints" / name, map_location="cpu", weights_only=True)
            state.pop("config", None)
            found[f"{phase}/{name}"] = _digest(state)
    return found


def _digest(value: object) -> str:
    """A hash of nested dictionaries, lists, tensors and plain values."""
    import torch

    if isinstance(value, torch.Tensor):
        text = (
            f"{value.dtype}{tuple(value.shape)}".encode()
            + value.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        )
    elif isinstance(value, dict):
        items = sorted(value.items(), key=lambda item: str(item[0]))
        text = "".join(f"{key}={_digest(item)};" for key, item in items).encode()
    elif isinstance(value, list | tuple):
        text = "".join(_digest(item) for item in value).encode()
    else:
        text = repr(value).encode()
    return hashlib.sha256(text).hexdigest()


def group_members(group: int) -> list[int]:
    """The live processes of a process group."""
    members = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            members.append(int(path.parent.name))
    return members


def wait_until_gone(group: int, seconds: float = 30.0) -> bool:
    """True once no process of the group is left: the loading processes of a killed run end on their own."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if not group_members(group):
            return True
        time.sleep(0.1)
    return False


def kill_and_resume(
    overrides: Sequence[str], folder: Path, *, chance: random.Random, duration: float, most: int
) -> Iterator[str]:
    """Run until done, killed at most ``most`` times on the way; yields where each kill struck."""
    log = folder.with_suffix(".log")
    arguments = [*overrides, f"hydra.run.dir={folder}", f"cache_dir={folder.with_suffix('.cache')}"]
    for number in range(most + 1):
        process = start(arguments, log)
        assert process.pid is not None
        if number < most:
            struck = _strike(process, folder, chance, duration)
            if struck is not None:
                process.join()
                assert wait_until_gone(process.pid), f"processes are left behind: {group_members(process.pid)}"
                yield struck
                continue
        process.join()
        assert process.exitcode == 0, f"exit code {process.exitcode}, see {log}:\n{log.read_text()[-3000:]}"
        return


def _strike(
    process: multiprocessing.process.BaseProcess, folder: Path, chance: random.Random, duration: float
) -> str | None:
    """Send SIGKILL at a random moment, or when a checkpoint is being written; None if the run was over before."""
    process.join(chance.uniform(0, duration))
    wanted = chance.random() < 0.5
    end = time.monotonic() + duration
    while wanted and process.is_alive() and time.monotonic() < end:
        if any(folder.glob("*/checkpoints/incoming.pt*")):
            break
        time.sleep(0.0002)
    if not process.is_alive():
        return None
    os.kill(process.pid, signal.SIGKILL)  # type: ignore[arg-type]
    process.join()
    half = sorted(
        path.name for path in folder.glob("*/checkpoints/*") if path.suffix == ".tmp" or "incoming" in path.name
    )
    steps = {path.parent.name: path.read_bytes().count(b"\n") for path in folder.glob("*/metrics.jsonl")}
    return f"{steps or 'before the first step'}{' while writing ' + ', '.join(half) if half else ''}"


def kills(folder: Path, *, number: int, seed: int) -> bool:
    """Kill and resume each variant in turn until ``number`` kills have struck; True if every hash was right."""
    chance = random.Random(seed)
    expected, durations = {}, {}
    for name, options in VARIANTS.items():
        reference = folder / f"{name.split(',')[0].replace(' ', '-')}-whole"
        begun = time.monotonic()
        for _ in kill_and_resume([*SMALL, *options], reference, chance=chance, duration=0, most=0):
            pass
        durations[name] = time.monotonic() - begun
        expected[name] = hashes(reference)
        print(f"{name}: uninterrupted in {durations[name]:.1f} s", flush=True)
    struck = attempt = wrong = 0
    while struck < number:
        name = list(VARIANTS)[attempt % len(VARIANTS)]
        attempt += 1
        run = folder / f"run-{attempt}"
        most = min(6, number - struck)
        for where in kill_and_resume(
            [*SMALL, *VARIANTS[name]], run, chance=chance, duration=durations[name] / 2, most=most
        ):
            struck += 1
            print(f"  kill {struck}: {name}, {where}", flush=True)
        differing = [key for key, value in hashes(run).items() if expected[name][key] != value]
        wrong += bool(differing)
        print(f"{name}: {'EQUAL' if not differing else 'DIFFERENT: ' + ', '.join(differing)}", flush=True)
    print(f"{struck} kills, {attempt} runs, {attempt - wrong} equal to the uninterrupted run", flush=True)
    return wrong == 0


def leaks(folder: Path, *, steps: int) -> bool:
    """Train ``steps`` steps and look at memory, threads, files and processes; True if nothing grows."""
    options = [
        item for item in SMALL if not item.startswith(("schedule", "checkpoint_every", "evaluation.every_steps"))
    ]
    arguments = [
        *options,
        "schedule=single",
        "schedule.train.epochs=null",
        f"schedule.train.steps={steps}",
        f"evaluation.every_steps={max(steps // 20, 1)}",
        "workers=2",
        "ema_decay=0.99",
        f"hydra.run.dir={folder / 'leaks'}",
        f"cache_dir={folder / 'leaks.cache'}",
    ]
    process = start(arguments, folder / "leaks.log")
    assert process.pid is not None
    records = folder / "leaks" / "train" / "metrics.jsonl"
    samples: list[tuple[int, int, int, int, int]] = []
    while process.is_alive():
        process.join(0.5)
        lines = records.read_bytes().count(b"\n") if records.exists() else 0
        try:
            samples.append((lines, *_usage(process.pid)))
        except (OSError, IndexError):
            break
    process.join()
    assert process.exitcode == 0, f"exit code {process.exitcode}, see {folder / 'leaks.log'}"
    gone = wait_until_gone(process.pid, 10)
    # The first fifth warms up: libraries, the allocator, the first evaluation.
    settled = [sample for sample in samples if sample[0] >= samples[-1][0] / 5]
    third = max(len(settled) // 3, 1)
    early, late = settled[:third], settled[-third:]
    rss = [sorted(sample[1] for sample in part)[len(part) // 2] for part in (early, late)]
    growth = rss[1] / rss[0] - 1
    threads, files, children = ([max(sample[at] for sample in part) for part in (early, late)] for at in (2, 3, 4))
    print(
        f"{steps} steps: memory {rss[0] / 2**20:.0f} -> {rss[1] / 2**20:.0f} MiB ({growth:+.2%}), threads {threads}, "
        f"open files {files}, processes {children}, left behind: {'nothing' if gone else 'PROCESSES'}"
    )
    return growth < 0.02 and threads[1] <= threads[0] and files[1] <= files[0] and children[1] <= children[0] and gone


def _usage(pid: int) -> tuple[int, int, int, int]:
    """(resident bytes, threads, open files, processes of the group) of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    resident = int(fields[21]) * os.sysconf("SC_PAGE_SIZE")
    return resident, int(fields[17]), len(os.listdir(f"/proc/{pid}/fd")), len(group_members(pid))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--cases", type=int, default=0, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    warm_up()
    with tempfile.TemporaryDirectory(prefix="segkit-soak-") as name:
        right = kills(Path(name), number=arguments.kills, seed=arguments.seed) if arguments.kills else True
        tight = leaks(Path(name), steps=arguments.steps) if arguments.steps else True
        held = True
        if arguments.cases:
            from soak_cases import try_cases

            held = try_cases(Path(name), times=arguments.cases, seed=arguments.seed)
    if not (right and tight and held):
        sys.exit(1)


if __name__ == "__main__":
    main()
