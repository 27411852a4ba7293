"""The documentation: the site builds without the network, every command in it works, every name in it exists."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
import tomllib
from html.parser import HTMLParser
from signal import SIGHUP, SIGINT, SIGTERM

import pytest
import yaml
from doc_commands import Runner
from doc_pages import DOCS, REPOSITORY, SHELL, blocks, first_table_cells, inline_code, looks_like_command, pages
from doc_workspace import Workspace

from segkit import cli
from segkit.check.findings import LEFT_OUT
from segkit.commands.export import FORMATS
from segkit.commands.options import DECISIONS
from segkit.config.compose import config_dir
from segkit.config.schema import FREE_KEYS, Config, DatasetConfig, EvaluationConfig, PhaseConfig
from segkit.data.labels import load_table
from segkit.errors import InputError, Interrupted, OutOfMemory
from segkit.evaluation.protocols import PROTOCOLS

GROUPS = ("dataset", "model", "loss", "optimizer", "schedule", "experiment", "debug", "sweep", "augment")
OPTIONS = [(path.parent.name, path.stem) for path in sorted(config_dir().rglob("*.yaml")) if path.stem != "train"]
PLAIN = ("text", "yaml", "python", "indented")
"""Languages of blocks beside those of a shell. A block of text shows output or folders, never a command."""

ENDS = (InputError.exit_code, Interrupted.exit_code, OutOfMemory.exit_code, 128 + SIGINT, 128 + SIGTERM, 128 + SIGHUP)
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]

few_pixels = [
    pytest.mark.filterwarnings("ignore:very few training pixels:UserWarning"),  # of a class, in four small images
    pytest.mark.filterwarnings("ignore:no training pixel:UserWarning"),
]


# -- commands ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def shared_workspace(tmp_path_factory):
    return Workspace(tmp_path_factory.mktemp("docs"))


@pytest.fixture
def workspace(shared_workspace, monkeypatch):
    """The folder in which the commands run, as the working directory."""
    monkeypatch.chdir(shared_workspace.root)
    monkeypatch.setenv("SEGKIT_CACHE", str(shared_workspace.root / "cache"))
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.delenv("SEGKIT_DEBUG", raising=False)
    monkeypatch.setattr("segkit.commands.models.MOST_ROWS", 2)  # encoders that segkit models builds
    return shared_workspace


TRAINED_PAGES = ("own.md", "sweeps.md", "tutorial.md")
"""Pages whose training commands are carried out; on the others they are followed up to the first step."""


def run_page(workspace: Workspace, name: str) -> int:
    """Run all blocks of a page in order; the number of commands."""
    dataset = name.removeprefix("datasets/").removesuffix(".md") if name.startswith("datasets/") else None
    dataset = None if dataset == "index" else dataset
    runner = Runner(workspace, dataset=dataset, trains=name in TRAINED_PAGES)
    namespace: dict[str, object] = {"__name__": "documentation"}
    count = 0
    for block in blocks(name):
        try:
            if block.language in SHELL or (block.language == "indented" and looks_like_command(block.text)):
                for command in block.commands():
                    runner.run(command)
                    count += 1
            elif block.language == "python" and block.title:
                workspace.add_module(block.title, block.text)
            elif block.language == "python":
                with workspace.small_runs():
                    exec(compile(workspace.substitute(block.text, dataset=dataset), block.where, "exec"), namespace)
            elif block.language == "yaml":
                workspace.add_yaml(block.title, block.text)
            else:
                assert block.language in PLAIN, f"language {block.language!r} of a block is not understood"
                assert not looks_like_command(block.text), "a command in a block of text: make it a block of bash"
        except Exception as error:
            raise AssertionError(f"docs, {block.where}: {error}") from error
    return count


SLOW_PAGES = ("tutorial.md", "deployment.md")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[*few_pixels, *[pytest.mark.slow, pytest.mark.nightly] * (name in SLOW_PAGES)])
        for name in pages()
    ],
)
def test_every_command_works(workspace, name, capsys):
    count = run_page(workspace, name)
    assert count or name in ("api.md", "faq.md"), f"{name} shows no command"


@few_pixels[0]
@few_pixels[1]
def test_the_notebook_runs(workspace):
    """Its code cells in order, with fewer steps; the last one shows three images beside three predictions."""
    cells = json.loads((REPOSITORY / "examples" / "first_run.ipynb").read_text(encoding="utf-8"))["cells"]
    namespace: dict[str, object] = {"__name__": "notebook"}
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    for key, given, few in (("limit_steps", 24, 6), ("num_images", 32, 8)):
        assert f"{key}={given}" in sources[0]
        sources[0] = sources[0].replace(f"{key}={given}", f"{key}={few}")
    for source in sources:
        exec(compile(source, "first_run.ipynb", "exec"), namespace)
    assert eval(sources[-1].splitlines()[-1], namespace).size == (2 * 96, 3 * 64)
    assert 0 < namespace["run"]["mean_iou"] < 1


def test_commands_in_running_text_work(workspace):
    """Those that train, and those of make and pip; other verbs are shown in blocks."""
    spans = {span for name in pages() for span in inline_code(name)}
    commands = sorted(span for span in spans if re.match(r"(python train\.py|make|pip) ", span))
    assert len(commands) >= 5
    for command in commands:
        Runner(workspace).run(command)


def test_every_verb_is_shown():
    shown = {
        words[1]
        for name in pages()
        for block in blocks(name)
        for command in block.commands()
        if (words := command.split())[0] == "segkit" and len(words) > 1
    }
    assert set(cli.VERBS) - {"train"} <= shown


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("segkit evalute runs/1", "segkit has no verb evalute"),
        ("frobnicate --all", "not understood: frobnicate"),
        ("python train.py dataset=camvid dataset.root=/data/CamVid loss.tua=3", r"loss\.tua"),
        ("python train.py dataset=nowhere", "Could not find 'dataset/nowhere'"),
        ("python train.py dataset=camvid", "the command names no dataset.root"),
        ("python train.py model.encoder=resnet1000", "there is no encoder resnet1000"),
        ("python train.py init_from=runs/nowhere", "init_from is runs/nowhere, but there is no such file"),
        ("python -m something", "not understood: python -m something"),
        ("python scripts/bench_losses.py --nothing", "has no --nothing"),
        ("make nothing", "the Makefile has no target nothing"),
        ("pip install requests", "not understood: pip install requests"),
        ("pip install -e '.[nothing]'", "there is no extra nothing"),
        ("unzip -q other.zip -d /data/camvid", "no data set knows an archive other.zip"),
        ("tensorboard --logdir nowhere", "no events below nowhere"),
        ("segkit compare runs/nowhere", "ended with 2"),
        ("ls nowhere", "returned non-zero exit status"),
        ("NOTHING=1 python train.py", "environment variable NOTHING"),
    ],
)
def test_a_wrong_command_is_noticed(workspace, command, reason):
    from hydra.errors import HydraException

    kinds = (AssertionError, InputError, HydraException, subprocess.CalledProcessError)
    with pytest.raises(kinds, match=reason):
        Runner(workspace).run(command)


# -- names ------------------------------------------------------------------------------------------------------------


def known_keys() -> set[str]:
    """Dotted keys of every option file, of train.yaml and of the schema."""
    keys: set[str] = set()

    def add(tree, prefix):
        for name, value in tree.items() if isinstance(tree, dict) else ():
            key = f"{prefix}.{name}" if prefix else str(name)
            keys.add(key)
            add(value, key)

    for path in config_dir().rglob("*.yaml"):
        group = path.parent.name if path.parent.name in GROUPS[:5] else ""
        add(yaml.safe_load(path.read_text(encoding="utf-8")), group)
    for kind, prefix in ((Config, ""), (DatasetConfig, "dataset."), (EvaluationConfig, "evaluation.")):
        keys |= {prefix + item.name for item in dataclasses.fields(kind)}
    phases = [key for key in keys if re.fullmatch(r"schedule\.\w+", key)]
    keys |= {f"{phase}.{item.name}" for phase in phases for item in dataclasses.fields(PhaseConfig)}
    return keys


ARGUMENTS = {"weights_only", "align_corners", "pixel_decomposable"}
"""Names with a value in running text that are arguments or attributes in Python, not keys."""
FILES = re.compile(r"\.(json|jsonl|yaml|npz|pt|py|txt|md)$")


def exists(word: str, keys: set[str]) -> bool | None:
    """Whether GROUP=OPTION, a dotted key, or KEY=VALUE in running text exists; None for any other word."""
    key, equals, value = word.partition("=")
    if equals and key in GROUPS:
        options = re.fullmatch(r"[a-z]\w*(,\w+)*", value)  # not dataset=NAME
        return all((key, option) in OPTIONS for option in value.split(",")) if options else None
    if re.fullmatch(r"[a-z_]+(\.[a-z_]+)+", key) and key.split(".")[0] in keys and not FILES.search(key):
        return key in keys
    if equals and re.fullmatch(r"[a-z_]+", key):
        return key in keys or key in ARGUMENTS
    return None


def test_keys_and_options_in_running_text_exist():
    keys = known_keys()
    words = [(name, word) for name in pages() for span in inline_code(name) for word in span.split()]
    found = {item: exists(item[1], keys) for item in words}
    assert [item for item, known in found.items() if known is False] == []
    assert sum(known is True for known in found.values()) > 50
    assert exists("loss.tua=3", keys) is exists("dataset=citys", keys) is exists("seeed=1", keys) is False


def test_verbs_and_flags_in_running_text_exist():
    files = [path for folder in ("segkit/commands", "scripts") for path in (REPOSITORY / folder).glob("*.py")]
    source = "\n".join(path.read_text(encoding="utf-8") for path in files)
    torchrun = {"--max-restarts", "--nnodes", "--rdzv-endpoint"}
    known = {"--cfg", "--help", *torchrun, *(f"--{kind}" for kind in ("markdown", "csv", "latex"))}
    wrong = []
    for name in pages():
        for span in inline_code(name):
            words = span.split()
            if words[0] == "segkit" and len(words) > 1 and words[1] not in (*cli.VERBS, "--help", "--version"):
                wrong.append(f"{name}: {span}")
            flags = [word.split("=")[0] for word in words if word.startswith("--")]
            wrong += [f"{name}: {flag}" for flag in flags if flag not in known and f'"{flag}"' not in source]
    assert wrong == []


@pytest.mark.parametrize("group", GROUPS)
def test_every_option_is_mentioned(group):
    text = "\n".join(path.read_text(encoding="utf-8") for name, path in pages().items() if name != "README.md")
    missing = [name for kind, name in OPTIONS if kind == group and not re.search(rf"(`|{group}=){name}\b", text)]
    assert missing == []


def as_yaml(value: object) -> str:
    """A plain value as it is written in YAML."""
    return yaml.safe_dump(value).splitlines()[0]


def test_every_key_is_documented_with_its_default():
    content = yaml.safe_load((config_dir() / "train.yaml").read_text(encoding="utf-8"))
    del content["defaults"]
    nested = ("evaluation", "sweep")
    tables = [(first_table_cells("configuration.md", "Keys of the run"), content)]
    tables += [(first_table_cells("configuration.md", f"`{name}`"), content[name]) for name in nested]
    for table, values in tables:
        assert set(table) == set(values)
        for key, value in values.items():
            if key not in (*nested, "hydra") and not str(value).startswith("${"):
                assert table[key][0].strip("`") == as_yaml(value), key
    dataset = first_table_cells("configuration.md", "`dataset`")
    phase = first_table_cells("configuration.md", "`schedule.PHASE`")
    assert {item.name for item in dataclasses.fields(DatasetConfig)} <= set(dataset)
    assert {item.name for item in dataclasses.fields(PhaseConfig)} <= set(phase)


def test_every_group_is_documented_with_its_options():
    shown = first_table_cells("configuration.md", "Groups")
    assert set(shown) >= set(GROUPS)
    readme = first_table_cells("README.md", "Your data, your machine")
    of_readme = ("dataset", "model", "schedule", "optimizer", "augment", "sweep", "debug")
    cells = [(group, shown[group][0]) for group in ("optimizer", "schedule", "experiment", "sweep", "debug")]
    for group, cell in [*cells, *((group, readme[group][0]) for group in of_readme)]:
        assert set(re.findall(r"`(\w+)`", cell)) == {name for kind, name in OPTIONS if kind == group}, group


@pytest.mark.parametrize(
    ("name", "heading", "named"),
    [
        ("evaluation.md", "Benchmarks", PROTOCOLS),
        ("evaluation.md", "Decisions", DECISIONS),
        ("deployment.md", "Export", FORMATS),
        ("losses.md", None, [name for kind, name in OPTIONS if kind == "loss"]),
        ("cluster.md", "Exit codes", ["0", *(str(code) for code in ENDS)]),
        ("install.md", None, PROJECT["optional-dependencies"]),
    ],
)
def test_a_table_names_what_the_code_has(name, heading, named):
    assert {key for key in first_table_cells(name, heading) if not key.endswith("=") and "--" not in key} == set(named)


def test_no_heading_and_no_row_stands_twice_on_a_page():
    for name, path in pages().items():
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith(("## ", "| `"))]
        assert len(lines) == len(set(lines)), name


def test_keys_that_may_change_are_listed():
    text = pages()["resuming.md"].read_text(encoding="utf-8")
    listed = re.search(r"- (`dataset\.root`.*?) may change\.", text, re.DOTALL)[1]
    free = {"dataset.root", *FREE_KEYS} - {"resume", "ignore_config_change"}
    assert set(re.findall(r"`([\w.]+)`", listed)) == free


def test_numbers_of_images_and_classes_are_those_of_the_label_tables():
    shown = first_table_cells("datasets/index.md")
    assert set(shown) - {"dataset="} == {name for kind, name in OPTIONS if kind == "dataset"}
    for name in set(shown) - {"dataset=", "folder"}:
        config = yaml.safe_load((config_dir() / "dataset" / f"{name}.yaml").read_text(encoding="utf-8"))
        data = name.removesuffix("_coarse")
        table = load_table(f"{data}_parts" if data == "robotic_instrument" else data)
        splits = dict.fromkeys((config["train_split"], config["val_split"], "test"))
        numbers = [table.splits[split] - LEFT_OUT.get((data, split), 0) for split in splits]
        assert shown[name][0] == " / ".join(map(str, numbers)), name
        assert int(re.match(r"\d+", shown[name][1])[0]) == table.num_classes, name
        for line in pages()[f"datasets/{data}.md"].read_text(encoding="utf-8").splitlines():
            if (row := re.match(r"\| `(\w+)`", line)) and row[1] in table.splits:
                number = table.splits[row[1]] - LEFT_OUT.get((data, row[1]), 0)
                assert str(number) in re.findall(r"\d+", line), line


def test_links_of_the_pages_beside_docs_lead_somewhere():
    for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md"):
        text = (REPOSITORY / name).read_text(encoding="utf-8")
        for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]+)#?([^)]*)\)", text):
            assert (REPOSITORY / target).exists(), (name, target)
            titles = re.findall(r"^#+ (.*)", (REPOSITORY / target).read_text("utf-8"), re.MULTILINE) if anchor else ()
            slugs = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
            assert not anchor or anchor in slugs, (name, target, anchor)


# -- the site ---------------------------------------------------------------------------------------------------------


class References(HTMLParser):
    """Collects what a page loads by itself: scripts, styles, pictures, frames. Links that one clicks are none."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.formulas = 0

    def handle_starttag(self, tag, attrs):
        self.formulas += tag == "math"
        if tag in ("script", "link", "img", "iframe", "source", "video", "object"):
            self.loaded += [value for name, value in attrs if name in ("src", "href", "data", "srcset") and value]


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    pytest.importorskip("mkdocs", reason="needs the extra 'docs'")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not re.search(r"^WARNING", done.stderr, re.MULTILINE)
    return folder


def test_the_site_loads_nothing_from_elsewhere(site):
    built = sorted(site.rglob("*.html"))
    wanted = {name.removesuffix(".md") + ".html" for name in pages() if name != "README.md"}
    assert wanted <= {path.relative_to(site).as_posix() for path in built}
    for path in built:
        page = References()
        page.feed(path.read_text(encoding="utf-8"))
        outside = [value for value in page.loaded if re.match(r"(?i)(https?:)?//", value.strip())]
        assert outside == [], path
    for path in site.rglob("*.css"):
        assert not re.search(r"url\(\s*['\"]?(https?:)?//|@import", path.read_text(encoding="utf-8")), path


def test_formulas_need_no_script(site):
    page = References()
    text = (site / "margins.html").read_text(encoding="utf-8")
    page.feed(text)
    assert page.formulas > 20
    for name in pages():
        if name != "README.md":
            left = (site / name).with_suffix(".html").read_text(encoding="utf-8")
            assert 'class="arithmatex"' not in left
            assert "<merror" not in left


@pytest.mark.parametrize("name", ["loss_table.md", "loss_bench.md"])
def test_generated_tables_are_in_the_site(site, name):
    lines = (DOCS / name).read_text(encoding="utf-8").strip().splitlines()
    rows = [line for line in lines if line.startswith("| ") and not line.startswith("| loss |")]
    text = (site / "losses.html").read_text(encoding="utf-8")
    assert rows
    for row in rows:
        assert f"<td>{row.split('|')[1].strip()}</td>" in text


def test_pictures_are_small():
    files = sorted((DOCS / "images").iterdir())
    assert files
    assert [path.name for path in files if path.stat().st_size > 300_000] == []
