"""The pages' tables are those of the records; what the pages link and type is there."""
from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from machine import ROOT
from tiny import CHECKPOINTS

import tables
from llmgr.experiments.pages import BLOCK, Tables, pages

PAGES = [page.relative_to(ROOT) for page in pages(ROOT)]
TYPED = [*PAGES, Path("CONTRIBUTING.md")]
README = (ROOT / "README.md").read_text()


def blocks(page: str) -> str:
    """The commands of a page: its fenced bash blocks, continued lines joined."""
    return "\n".join(re.findall(r"^```bash\n(.*?)^```", page, re.M | re.S)).replace("\\\n", " ")


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_making_the_tables_anew_changes_nothing(page: Path) -> None:
    text = (ROOT / page).read_text()
    assert Tables(ROOT / "reports/results").fill(text) == text, "python stages/tables.py writes them"


def test_the_script_writes_tables_that_are_out_of_date(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(ROOT / "reports/results", tmp_path / "reports/results")
    shutil.copy(ROOT / "dvc.yaml", tmp_path)
    for page in PAGES:
        (tmp_path / page).write_text(BLOCK.sub(r"\1\3", (ROOT / page).read_text()))
    monkeypatch.chdir(tmp_path)
    tables.main(None)
    assert [(tmp_path / page).read_text() for page in PAGES] == [(ROOT / page).read_text() for page in PAGES]


def test_every_table_stands_on_a_page() -> None:
    placed = [name for page in PAGES for _, name, _ in BLOCK.findall((ROOT / page).read_text())]
    assert sorted(placed) == sorted(Tables(ROOT / "reports/results").specs)


@pytest.mark.parametrize("page", ["README.md", "reports/RESULTS.md"])
def test_the_front_door_stays_short(page: str) -> None:
    assert len((ROOT / page).read_text().splitlines()) <= 250


@pytest.mark.parametrize("page", TYPED, ids=str)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    text = (ROOT / page).read_text()
    for link, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(#[^)]*)?\)", text):
        target = (ROOT / page).parent / link
        assert not link or target.exists(), link
        if anchor:
            heads = re.findall(r"^#+ (.*)$", target.read_text() if link else text, re.M)
            assert anchor[1:] in {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}, anchor


@pytest.mark.parametrize("page", TYPED, ids=str)
def test_what_the_commands_name_is_there(page: Path) -> None:
    commands = blocks((ROOT / page).read_text())
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"(?:^|\n) *make ([\w-]+)", commands)) <= targets
    for name in re.findall(r"\bstages/[\w/.-]+", commands):
        assert (ROOT / name).exists(), name
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    for key in re.findall(r"-S '?([a-z][\w.]*)=", commands):
        value = params
        for part in key.split("."):
            assert isinstance(value, dict) and part in value, key
            value = value[part]


@pytest.mark.parametrize("page", TYPED, ids=str)
def test_commands_can_be_pasted(page: Path) -> None:
    commands = blocks((ROOT / page).read_text())
    assert subprocess.run(["bash", "-n"], input=commands, text=True, capture_output=True).stderr == ""


def test_the_library_does_what_its_example_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"^```python\n(.*?)^```", README, re.M | re.S)
    assert len(code.split("\n\n")[-1].splitlines()) <= 15
    (tmp_path / "models").mkdir()
    (tmp_path / "models/backbone").symlink_to(CHECKPOINTS / "stories260K")
    (tmp_path / "params.yaml").symlink_to(ROOT / "params.yaml")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    torch.manual_seed(1)
    exec(code, names)
    assert names["scores"].shape == (7, 10)
    sessions, samples = names["sessions"], names["samples"]
    untrained = names["build"](names["params"], "models/backbone", names["vectors"], names["texts"])
    assert not torch.equal(untrained.eval().over(sessions)(samples), names["scores"])


def test_the_tree_lists_what_there_is() -> None:
    tree = README[README.index("## The tree"):]
    stages = {f"{name}.py" for name in yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]}
    for indent, there in ((2, {path.name for path in (ROOT / "stages").glob("*.py")} - stages),
                          (4, {f"{path.parent.name}/" for path in (ROOT / "stages/llmgr").glob("*/__init__.py")})):
        listed = re.findall(rf"^ {{{indent}}}((?:\w+(?:\.py|/) *)+)", tree, re.M)
        names = {name for line in listed for name in line.split()} - {"llmgr/", "presets/"}
        assert names == there

