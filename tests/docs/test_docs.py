"""Everything that README.md and docs/ show can be run, and every link leads somewhere."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import yaml
from pages import ROOT, Block, Page, blocks, check_output, commands, run_command

from simulator.schedules import registry

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
EXPERIMENTS = sorted((ROOT / "experiments").glob("*.yaml"))
#: More accelerators than this make an example too slow for a test of all examples.
_SMALL = 64
#: The pages show commands on large examples. Whether a command works does not depend on size, so
#: the pages' copies have fewer accelerators, layers and micro-batches.
_SMALLER: dict[str, dict[str, Any]] = {
    "llama3_70b_64xh100.yaml": {
        "model": {"base": "llama3-70b", "layers": 8},
        "cluster": {"nodes": 1},
        "parallel": {"tensor": 2, "pipeline": 2, "virtual_stages": 2},
        "training": {"global_batch_size": 8},
    },
    "gpt3_175b_64xa100.yaml": {
        "model": {"base": "gpt3-175b", "layers": 8},
        "cluster": {"nodes": 1},
        "parallel": {"tensor": 2, "pipeline": 2, "virtual_stages": 2},
        "training": {"global_batch_size": 8},
    },
}


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as a clone of the repository, in which a page may write what it likes."""
    for name in ("experiments", "topologies"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for name, changes in _SMALLER.items():
        path = tmp_path / "experiments" / name
        experiment = yaml.safe_load(path.read_text(encoding="utf-8"))
        for key, value in changes.items():
            if isinstance(experiment.get(key), dict):
                experiment[key].update(value)
            else:
                experiment[key] = value
        path.write_text(yaml.safe_dump(experiment), encoding="utf-8")
    (tmp_path / "benchmarks").symlink_to(ROOT / "benchmarks")
    (tmp_path / "docs").mkdir()
    # What a page registers is gone after it.
    for table in ("_KINDS", "_ALIASES"):
        monkeypatch.setattr(registry, table, dict(getattr(registry, table)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("MPLBACKEND", "agg")
    return tmp_path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_of_a_page_runs(page: Path, workspace: Path) -> None:
    Page().run_all(blocks(page))


def test_the_readme_can_be_followed_from_top_to_bottom(workspace: Path) -> None:
    """Its blocks, then its table of commands; what they write is no untracked file of a clone."""
    readme = ROOT / "README.md"
    before = {path.name for path in workspace.iterdir()}
    Page().run_all(blocks(readme))
    table = readme.read_text(encoding="utf-8").partition("| question | command |")[2]
    rows = [line for line in table.partition("\n\n")[0].splitlines() if "`simulator " in line]
    assert len(rows) >= 9
    for line in rows:
        for command in re.findall(r"`(simulator [^`]+)`", line):
            if command != "simulator validate":  # takes minutes
                run_command(command, Block(readme, 0, "sh", command))
    written = {path.name for path in workspace.iterdir()} - before
    assert {"out", "sweep", "schedule.html", "difference.html"} < written
    ignored = [line.strip("/") for line in (ROOT / ".gitignore").read_text().splitlines()]
    assert [name for name in written if not any(fnmatch(name, line) for line in ignored)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_local_link_leads_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    text = re.sub(r"`[^`\n]*`", "", text)
    for target in re.findall(r"\]\(([^)\s]+)(?:\s[^)]*)?\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        linked = (page.parent / name).resolve() if name else page
        assert linked.exists(), f"{page.name}: {target} leads nowhere"
        if anchor and linked.suffix == ".md":
            assert anchor in _anchors(linked), f"{page.name}: {target} has no such heading"


def _anchors(page: Path) -> set[str]:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    headings = re.findall(r"^#+ +(.+?) *$", text, flags=re.M)
    return {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", h.lower())).strip("-") for h in headings}


def test_the_reference_of_the_experiment_file_is_up_to_date() -> None:
    from simulator.experiment_reference import reference

    page = (ROOT / "docs" / "experiment.md").read_text(encoding="utf-8")
    assert page == reference(), "python -m simulator.experiment_reference > docs/experiment.md"


def test_the_reference_names_every_key() -> None:
    import dataclasses

    from simulator.experiment_reference import SECTIONS, attribute_docs, reference

    page = reference()
    for prefix, cls, _ in SECTIONS:
        for item in dataclasses.fields(cls):
            key = f"{prefix}.{item.name}" if prefix else item.name
            assert f"| `{key}` |" in page
            assert attribute_docs(cls).get(item.name), f"{cls.__name__}.{item.name} has no text"


def test_every_page_is_in_the_index_and_in_the_site() -> None:
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    listed = set(_leaves(site["nav"]))
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name in listed, f"mkdocs.yml does not list {page.name}"
        if page.name != "index.md":
            assert f"({page.name})" in index, f"docs/index.md does not lead to {page.name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_named_in_the_text_exists(page: Path) -> None:
    """`simulator …` in running text and tables: the command and its options are known."""
    import click

    from simulator.cli import group

    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    context = click.Context(group)
    named = re.findall(r"`simulator +([^`]+)`|^ {4}simulator +(.+)$", text, flags=re.M)
    for written in map("".join, named):
        words = written.split()
        command = group.get_command(context, words[0])
        assert command is not None, f"{page.name}: simulator {written}"
        if isinstance(command, click.Group) and len(words) > 1 and words[1][0].isalpha():
            command = command.get_command(context, words[1])
            assert command is not None, f"{page.name}: simulator {written}"
        known = {name for option in command.params for name in option.opts} | {"--help", "-h"}
        for word in words[1:]:
            if word.startswith(("experiments/", "topologies/")):
                assert (ROOT / word).exists(), f"{page.name}: simulator {written}: {word}"
            option = word.strip("[]|,").partition("=")[0]
            if option.startswith("-") and option[1:2].strip("-0123456789"):
                assert option in known, f"{page.name}: simulator {written}: {option}"


def _leaves(value: object) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return [leaf for inner in value.values() for leaf in _leaves(inner)]
    if isinstance(value, list):
        return [leaf for inner in value for leaf in _leaves(inner)]
    return []


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_every_example_can_be_run(path: Path) -> None:
    """Sweep files are expanded, the others resolved, the small ones of these simulated."""
    import simulator
    from simulator.simulation import resolve

    if "sweep" in yaml.safe_load(path.read_text(encoding="utf-8")):
        from simulator.studies.sweep_file import load_sweep

        assert load_sweep(str(path)).points()
        return
    experiment = simulator.load_experiment(path)
    plan, cluster = resolve(experiment)
    if len(cluster.accelerators) <= _SMALL and experiment.fold and not experiment.jitter:
        result = simulator.run(experiment, cluster=cluster)
        assert result.summary.step_time_s > 0.0
        # a plan_ file's own plan is only where the planner starts from
        assert result.summary.fits or path.name.startswith("plan_")
    else:
        assert plan.mesh.ranks > 0


def test_commands_are_parted() -> None:
    text = "simulator run a.yaml \\\n  --set 'b=[1, 2]'  # why\n\npytest x && simulator list models"
    assert commands(text) == [
        "simulator run a.yaml --set 'b=[1, 2]'",
        "pytest x",
        "simulator list models",
    ]


def _page(text: str, folder: Path) -> list[Block]:
    path = ROOT / "docs" / "none.md"  # blocks name themselves relative to the repository
    copy = folder / "page.md"
    copy.write_text(text, encoding="utf-8")
    return [replace(block, page=path) for block in blocks(copy)]


@pytest.mark.parametrize(
    "text",
    [
        "```sh\nfrobnicate\n```\n",
        "```sh\nsimulator list modles\n```\n",
        "```python\nassert False\n```\n",
        "```python\nimport simulator\nsimulator.runn\n```\n",
        "```yaml\n# experiments/tutorial_first.yaml\nmodel: llama3-8b\n```\n",
        "```yaml\nmodel: llama3-8b\ncluster: {topolgy: dgx-h100}\n```\n",
        "```python\nprint('a 2')\n```\n\n```text\nb 2\n```\n",
        "```python\nprint('a 2')\n```\n\n```text\na 4\n```\n",
        "```console\n$ simulator list frameworks\nno such line\n```\n",
        "<!-- fails: it does not -->\n```sh\nsimulator list models\n```\n",
    ],
)
def test_what_is_wrong_on_a_page_fails(text: str, workspace: Path) -> None:
    page = _page(text, workspace)
    with pytest.raises((Exception, pytest.fail.Exception)):
        Page().run_all(page)


def test_a_block_that_says_why_is_not_run(workspace: Path) -> None:
    Page().run_all(_page("<!-- no-test: reason -->\n```sh\nfrobnicate\n```\n", workspace))


def test_output_may_leave_out_lines_and_differ_a_little(workspace: Path) -> None:
    printed = "head\n│ step   100 ms │\nmore\nlast: one, two, three\n"
    for shown in ("head\nstep 110 ms\n...\nlast: one, …\n", "...\nmore\n...\n"):
        block = Block(ROOT / "README.md", 1, "text", shown)
        check_output(block, printed)
    for shown in ("head\nmore\n...\n", "head\nstep 10 ms\n...\n", "...\nlast: two, …\n"):
        with pytest.raises(AssertionError):
            check_output(Block(ROOT / "README.md", 1, "text", shown), printed)
