"""The pages name nothing that is not there, and keep their size."""

import importlib
import re
import shlex
from functools import reduce
from itertools import chain
from pathlib import Path

import pytest

from hrm_ray.config.arch import architectures
from hrm_ray.config.compose import train_config
from hrm_ray.config.inference import Inference
from hrm_ray.config.schema import TrainConfig
from hrm_ray.config.validate import known_keys

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = sorted([README, *(ROOT / "docs").glob("*.md")])
MAX_LINES = {"README.md": 150, "performance.md": 120}
MAX_WIDTH = 130  # outside tables
FENCE = re.compile(r"^```.*?^```\n", flags=re.M | re.S)
# Patterns, in lower case.
AVOIDED = ("anew", "want of", "of ours", "heeds?", "lest", "does well to", "others' reruns")
SOURCES = [
    path
    for folder in ("hrm_ray", "tests", "benchmarks", "tune_configs", "datasets")
    for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in (".py", ".yaml") and path != Path(__file__)  # which names the words
]


def each_page(test):
    return pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)(test)


def anchors(page: Path) -> set[str]:
    """The names by which links reach the headings of a page, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text()), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_page
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if link.startswith("http"):
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@each_page
def test_nothing_is_left_to_fill_in(page):
    assert not re.findall(r"\b[A-Z]{3,}_[A-Z_]{3,}\b", re.sub(r"`[^`]*`|RAY_ADDRESS", "", page.read_text()))


@each_page
def test_pages_are_short_and_lines_fit_a_screen(page):
    lines = page.read_text().splitlines()
    assert len(lines) <= MAX_LINES.get(page.name, len(lines))
    assert not [line for line in lines if len(line) > MAX_WIDTH and not line.startswith("|")]


def unplain(text: str) -> list[str]:
    """The `AVOIDED` words in a text, also where a line breaks between two of them."""
    text = re.sub(r"[\s#]+", " ", text.lower())
    return [words for words in AVOIDED if re.search(rf"\b{words}\b", text)]


@each_page
def test_words_are_plain(page):
    assert not unplain(page.read_text())


def test_words_of_the_code_are_plain():
    found = {str(path.relative_to(ROOT)): unplain(path.read_text()) for path in [ROOT / "Makefile", *SOURCES]}
    assert len(found) > 100 and not {path: words for path, words in found.items() if words}


def test_avoided_words_are_found():
    assert unplain("# Started Anew, for want\n    # of memory") == ["anew", "want of"]


@each_page
def test_benchmarks_and_make_targets_exist(page):
    text, targets = page.read_text(), re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.M)
    for module in re.findall(r"python -m (benchmarks\.\w+)", text):
        assert (ROOT / f"{module.replace('.', '/')}.py").is_file(), module
    for target in re.findall(r"(?:`|^)make ([a-z-]+)", text, flags=re.M):
        assert target in targets, target


TRAINING = re.compile(r"^(?:# +)?hrm-ray train ((?:[\w.-]+=\S+ *)+)", flags=re.M)
YAMLS = sorted(
    chain(*((ROOT / folder).rglob("*.yaml") for folder in ("hrm_ray/config", "tune_configs", "datasets")))
)
# Of the page that says how to add them.
OF_THE_READER = ("arch=gated",)


@pytest.mark.parametrize("page", [*PAGES, *YAMLS], ids=lambda page: page.name)
def test_commands_of_training_are_understood(page):
    for words in TRAINING.findall(page.read_text()):
        if not any(word in words for word in OF_THE_READER):
            train_config(shlex.split(words), by_hand=True)


def test_commands_of_training_are_found():
    assert sum(len(TRAINING.findall(page.read_text())) for page in [*PAGES, *YAMLS]) > 40


def test_every_recipe_experiment_and_sweep_is_in_the_readme():
    readme = README.read_text()
    for folder in ("datasets", "hrm_ray/config/experiment", "tune_configs"):
        for file in (ROOT / folder).glob("*.yaml"):
            assert re.search(rf"`([^`]*[= ])?{file.stem}\b", readme), file


@pytest.mark.parametrize(
    "folder, page, heading",
    [
        ("datasets", "data.md", "Recipes"),
        ("hrm_ray/config/experiment", "training.md", "Experiments"),
        ("tune_configs", "tuning.md", "Sweeps that ship"),
    ],
)
def test_every_recipe_experiment_and_sweep_is_in_the_table_of_its_page(folder, page, heading):
    section = (ROOT / "docs" / page).read_text().partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    firsts = re.findall(r"^\|([^|]*)\|", section, flags=re.M)
    listed = set(re.findall(r"`(\w+)`", " ".join(firsts)))
    assert {file.stem for file in (ROOT / folder).glob("*.yaml")} <= listed


def test_every_page_is_in_the_readme():
    for page in (ROOT / "docs").glob("*.md"):
        assert f"](docs/{page.name})" in README.read_text(), page


PAPERS = re.sub(r"```.*?```", "", (ROOT / "docs/paper-to-code.md").read_text(), flags=re.S)
SPANS = re.findall(r"`([^`]+)`", PAPERS)


@pytest.mark.parametrize(
    "name", sorted({s for s in SPANS if re.match(r"(models|data|training|optim|config|halting)\.\w", s)})
)
def test_functions_named_beside_the_papers_exist(name):
    *modules, last = name.split(".")
    first_class = next((i for i, part in enumerate(modules) if part[0].isupper()), len(modules))
    module = importlib.import_module(".".join(["hrm_ray", *modules[:first_class]]))
    reduce(getattr, [*modules[first_class:], last], module)


def test_keys_named_beside_the_papers_exist():
    keys = {
        *known_keys(TrainConfig),
        *known_keys(Inference),
        *chain(*(known_keys(kind, "arch.") for kind in architectures().values())),
    }
    named = {span.partition("=")[0] for span in SPANS if re.fullmatch(r"arch\.[\w.]+(=\S+)?|\w+=\w+", span)}
    assert len(named) >= 20
    assert named - {"arch", "halting"} <= keys
