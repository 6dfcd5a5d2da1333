"""The pages say nothing that is not there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere_and_nothing_is_left_to_fill_in(page):
    text = page.read_text()
    links = re.findall(r"\]\(([^)#]+)\)", text)
    for link in links:
        assert link.startswith("http") or (page.parent / link).exists(), link
    assert not re.findall(r"\b[A-Z]{3,}_[A-Z_]{3,}\b", re.sub(r"`[^`]*`|RAY_ADDRESS", "", text))


def test_every_recipe_experiment_and_sweep_is_in_the_readme():
    readme = (ROOT / "README.md").read_text()
    for folder in ("datasets", "hrm_ray/config/experiment", "tune_configs"):
        for file in (ROOT / folder).glob("*.yaml"):
            assert f"`{file.stem}`" in readme, file
