"""Everything that a machine without a GPU cannot measure, in one go: ``make gpu-test``.

    python scripts/gpu_report.py [--output gpu.md] [--device cuda]

First the tests marked ``gpu`` (the same numbers as on the CPU; no step waits for the device), then the benches. Writes
a table for the README, every row with its command, and below it what each command printed.
"""

from __future__ import annotations

import argparse
import platform
import re
import subprocess
import sys
from pathlib import Path

import torch

BENCHES = (
    (
        "trainer, images a second, DeepLabV3+ on EfficientNet-Lite0",
        "a bare loop",
        "scripts/bench_trainer.py --model deeplabv3plus_lite --batch 16 --size 512 512 --precision bf16",
        r"ratio +([\d.]+)",
    ),
    (
        "gradient checkpointing, DeepLabV3+ on SE-ResNeXt-50, 2 x 512 x 512: memory and time of light, mixed and true, "
        "in fp32 and bf16",
        "without",
        "scripts/bench_checkpointing.py --model se-resnext",
        r"(?:fp32|bf16) +(?:light|mixed|true) +\d+ +([\d.]+) +[\d.]+ +([\d.]+)",
    ),
    (
        "margin calibration, K=19 and K=150: time (plain, compiled)",
        "torch's cross-entropy",
        "scripts/bench_losses.py --md --no-memory --cases 1 2 --only margin",
        r"\| margin calibration(?:, compiled)? \| [\d.]+ \| ([\d.]+)",
    ),
    (
        "sliding windows, flips and six scales, 1024 x 2048, K=19: memory",
        "a whole image",
        "scripts/bench_inference.py --model se-resnext --classes 19",
        r"memory +([\d.]+)x",
    ),
)
"""(what, beside what, command, pattern whose groups are the figures)"""
TESTS = "-m pytest -q -p no:cacheprovider -m gpu"


def run(command: str) -> tuple[int, str]:
    """Exit code and output of ``python COMMAND``."""
    print(f"$ python {command}", flush=True)
    done = subprocess.run(
        [sys.executable, *command.split()], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    print(done.stdout, flush=True)
    return done.returncode, done.stdout


def table(rows: list[tuple[str, str, str, str]]) -> str:
    """The rows (what, beside, figures, command) in Markdown."""
    lines = ["| what | beside | here | command |", "|---|---|---|---|"]
    return "\n".join(
        [*lines, *(f"| {what} | {beside} | {here} | `{command}` |" for what, beside, here, command in rows)]
    )


def main() -> None:
    """Write the report; exit code 1 if a test or a bench failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("gpu.md"))
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("error: there is no CUDA device here: run this on a machine with one")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu"
    code, tested = run(TESTS)
    failed, rows, printed = code != 0, [], [("tests", tested)]
    for what, beside, command, pattern in BENCHES:
        command += f" --device {arguments.device}"
        code, text = run(command)
        found = [
            figure for match in re.findall(pattern, text) for figure in ((match,) if isinstance(match, str) else match)
        ]
        failed |= code != 0 or not found
        rows.append((what, beside, " / ".join(found) or f"failed (exit code {code})", command))
        printed.append((command, text))
    head = f"{name}, torch {torch.__version__}, {platform.platform()}; tests: {tested.strip().splitlines()[-1]}"
    details = "\n\n".join(f"`{title}`\n\n```text\n{text.strip()}\n```" for title, text in printed)
    arguments.output.write_text(f"{head}\n\n{table(rows)}\n\n{details}\n", encoding="utf-8")
    print(f"written: {arguments.output}")
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
