"""Things that a stranger may put into a run folder, made by functions of that folder.

Every entry names the file it is about, the readers that must refuse it, and what the sentence must say. ``MODEL`` opens
the run and loads its weights, ``COMPARE`` is ``segkit compare``, ``DECISION`` reads its fitted bias, ``REPLAY`` repeats
the step of a bundle that is made of the folder (of its config.yaml, label counts, last.pt, and what lies in bundle/).
``HUB`` predicts with the folder hub/ that segkit export has written of the run.
"""

from __future__ import annotations

from corpus_cases import MODEL, REPLAY, Case
from corpus_exports import BUNDLES, HUBS
from corpus_runs import CHECKPOINTS, CONFIGS
from corpus_tables import TABLES


def also_replayed(case: Case) -> Case:
    """``case`` with the reader ``REPLAY``, where a bundle holds the file that it is about."""
    elsewhere = MODEL not in case.readers or case.name.startswith("checksums") or case.name in SUMS_ONLY
    return case if elsewhere else case._replace(readers=(*case.readers, REPLAY))


SUMS_ONLY = tuple(f"checkpoint: {kind}" for kind in ("a flipped bit", "a folder", "a pipe", "an average of text"))
"""What the digests of a run find, or what a bundle does not need."""

CORPUS = [*map(also_replayed, CONFIGS[::3]), *(case for n, case in enumerate(CONFIGS) if n % 3)]
CORPUS += [*map(also_replayed, (*CHECKPOINTS, *TABLES)), *BUNDLES, *HUBS]
