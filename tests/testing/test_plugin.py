"""The pytest plugin, as a project that uses it sees it."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

# what the inner sessions import must be there before: modules of C cannot be loaded twice, and
# pytester forgets after a session what was imported in it
import simulator.simulation
import simulator.testing.comparison  # noqa: F401

pytest_plugins = ("pytester",)

TEST = """
    import dataclasses
    import pytest
    from simulator.experiment import parse_experiment
    from simulator import programs
    from simulator.simulation import run

    EXPERIMENT = parse_experiment({
        "model": "llama2-7b",
        "cluster": {"topology": "dgx-a100", "nodes": 1},
        "parallel": {"tensor": 2, "pipeline": 4},
        "training": {"global_batch_size": 8},
    })

    def test_step(simulator_baseline, monkeypatch):
        {seed}
        simulator_baseline(run(EXPERIMENT{change}))
"""

SEEDS = {
    "nothing": ("", ""),
    "link": (
        "",
        '.replace(**{"cluster.faults": '
        '[{"link": ["node0/gpu3", "node0/nvswitch"], "bandwidth_factor": 0.2}]})',
    ),
    "operation": (
        "original = programs.kernel_cost\n"
        "        monkeypatch.setattr(programs, 'kernel_cost', lambda op, *a, **k: "
        "dataclasses.replace(c := original(op, *a, **k), "
        "compute=c.compute * (1.2 if op.name == 'attention.qkv' else 1.0)))",
        "",
    ),
    "schedule": ("", '.replace(**{"parallel.schedule": "gpipe"})'),
}


def write(pytester: pytest.Pytester, seed: str) -> None:
    code, change = SEEDS[seed]
    text = TEST.replace("{seed}", code or "pass").replace("{change}", change)
    pytester.makepyfile(test_project=text)


@pytest.fixture
def project(pytester: pytest.Pytester) -> pytest.Pytester:
    """A project with a baseline of the undisturbed step."""
    write(pytester, "nothing")
    pytester.runpytest_inprocess("--simulator-update").assert_outcomes(passed=1)
    return pytester


def test_without_a_baseline_the_test_says_how_to_write_it(pytester: pytest.Pytester) -> None:
    write(pytester, "nothing")
    result = pytester.runpytest_inprocess()
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*no baseline*test_step.yaml*--simulator-update*"])
    assert not (pytester.path / "baselines").exists()


def test_an_unchanged_step_passes(project: pytest.Pytester) -> None:
    path = project.path / "baselines" / "test_project" / "test_step.yaml"
    before = path.read_text()
    project.runpytest_inprocess().assert_outcomes(passed=1)
    assert path.read_text() == before


@pytest.mark.parametrize(
    ("seed", "lines"),
    [
        (
            "link",
            [
                "*Likely cause:*",
                "*NVLink links:*node0/gpu3 -> node0/nvswitch*",
                "*exposed communication, tensor:*",
                "*all_reduce*stage*latency or link bandwidth*",
            ],
        ),
        (
            "operation",
            [
                "*Likely cause:*",
                "*slower operation: attention.qkv forward (gemm, compute stream) on stages 0-3*",
                "*step time:*",
                "*stage ?, forward:*",
                "*micro-batches all changed*",
            ],
        ),
        (
            "schedule",
            [
                "*Likely cause:*",
                "*schedule changed*pipeline rank 0*",
                "*Order of passes:*",
            ],
        ),
    ],
)
def test_a_seeded_slowdown_is_caught_and_named(
    project: pytest.Pytester, seed: str, lines: list[str]
) -> None:
    write(project, seed)
    result = project.runpytest_inprocess()
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(lines)


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (lambda text: "", "*not a baseline of format 1*"),
        (lambda text: "\x00\x01", "*the baseline cannot be read:*"),
        (lambda text: "{", "*the baseline cannot be read:*not valid YAML*"),
        (lambda text: text[: len(text) // 2].rstrip()[:-3], "*the baseline cannot be read:*"),
        (lambda text: "[1, 2]", "*not a baseline of format 1*"),
        (lambda text: '{"format": 1', "*the baseline cannot be read:*not valid YAML*"),
        (lambda text: text.replace("format: 1", "format: 7"), "*not a baseline of format 1*"),
        (
            lambda text: re.sub(r"step_time_s: .*", "step_time_s: fast", text),
            "*summary > step_time_s: should be a valid number*got 'fast'",
        ),
        (
            lambda text: re.sub(r"step_time_s: .*", "step_time_s: true", text),
            "*summary > step_time_s: expected a number, got True*",
        ),
        (
            lambda text: re.sub("stage 0: {count", "stage 0-99999999: {count", text, count=1),
            "*operations > *should be a number or a range such as 3-5*",
        ),
        (
            lambda text: re.sub(r"order:\n  0: .*", "order:\n  0: 9999999x[F0]+1", text),
            "*order > 0*more than*passes*",
        ),
    ],
)
def test_a_corrupt_baseline_is_one_clear_failure(
    project: pytest.Pytester, damage: Callable[[str], str], line: str
) -> None:
    path = project.path / "baselines" / "test_project" / "test_step.yaml"
    path.write_text(damage(path.read_text()))
    result = project.runpytest_inprocess()
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines([f"*cannot be read: {path}*", "*--simulator-update*"])
    result.stdout.fnmatch_lines([line])
    result.stdout.no_fnmatch_line("*Traceback*")
    result.stdout.no_fnmatch_line("*baseline.py*:*")
    # one line, however long the folder's name is (pytest's own summary may repeat it whole)
    said = [text for text in result.stdout.lines if text.startswith("the baseline cannot be read:")]
    assert len(said) == 1
    assert len(said[0].replace(str(path), "PATH")) < 200
    result.stdout.no_fnmatch_line("*another exception occurred*")
    # and --simulator-update mends it
    project.runpytest_inprocess("--simulator-update").assert_outcomes(passed=1)
    project.runpytest_inprocess().assert_outcomes(passed=1)


def test_update_accepts_the_change(project: pytest.Pytester) -> None:
    write(project, "operation")
    project.runpytest_inprocess("--simulator-update").assert_outcomes(passed=1)
    project.runpytest_inprocess().assert_outcomes(passed=1)


def test_the_folder_is_configurable_and_results_have_names(pytester: pytest.Pytester) -> None:
    pytester.makeini("[pytest]\nsimulator_baselines = stored/steps\n")
    pytester.makepyfile(
        test_two="""
        import pytest
        EXPERIMENT = {"model": "llama2-7b", "cluster": {"topology": "dgx-a100", "nodes": 1}}
        from simulator.experiment import parse_experiment

        class TestSteps:
            @pytest.mark.parametrize("size", [1, 2])
            def test_sizes(self, simulator_baseline, size):
                simulator_baseline(parse_experiment({**EXPERIMENT, "parallel": {"tensor": size}}))
                simulator_baseline(
                    parse_experiment({**EXPERIMENT, "parallel": {"pipeline": size}}), "pipeline"
                )
                with pytest.raises(ValueError, match="different names"):
                    simulator_baseline(parse_experiment(EXPERIMENT), "pipeline")
        """
    )
    pytester.runpytest_inprocess("--simulator-update").assert_outcomes(passed=2)
    pytester.runpytest_inprocess().assert_outcomes(passed=2)
    found = sorted((pytester.path / "stored" / "steps" / "test_two").iterdir())
    assert [path.name for path in found] == [
        "TestSteps.test_sizes_1.pipeline.yaml",
        "TestSteps.test_sizes_1.yaml",
        "TestSteps.test_sizes_2.pipeline.yaml",
        "TestSteps.test_sizes_2.yaml",
    ]


def test_the_plugin_is_installed_with_the_package() -> None:
    from importlib.metadata import entry_points

    found = [entry.value for entry in entry_points(group="pytest11") if entry.name == "simulator"]
    assert found == ["simulator.testing.plugin"]


def test_the_plugin_imports_nothing_heavy(tmp_path: Path) -> None:
    code = (
        "import sys; before = set(sys.modules); import pytest; import simulator.testing.plugin;"
        "heavy = {'numpy', 'pandas', 'yaml', 'networkx', 'simpy', 'scipy', 'pyarrow', 'pydantic'};"
        "print(sorted(heavy & set(sys.modules) - before))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert done.stdout.strip() == "[]"
