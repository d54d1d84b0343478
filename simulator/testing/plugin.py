"""The pytest plugin: the fixture `simulator_baseline` and the option `--simulator-update`.

Imported at the start of every pytest session of an environment that has the package, so it
imports nothing but pytest and the standard library until a test uses the fixture.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from simulator.testing.comparison import Comparison

_DIRECTORY = "simulator_baselines"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--simulator-update` and the ini option `simulator_baselines`."""
    group = parser.getgroup("simulator", "simulated training steps")
    group.addoption(
        "--simulator-update",
        action="store_true",
        default=False,
        help="rewrite the baselines of simulated steps instead of comparing with them",
    )
    parser.addini(
        _DIRECTORY,
        "folder of the baselines of simulated steps, relative to the test file "
        "(default: baselines)",
        default="baselines",
    )


class SimulatorBaseline:
    """Compares a result with the baseline file of the test that uses it.

    Call it with a `Result` (or an experiment, which is simulated first). The file is
    `baselines/<test file>/<test name>.yaml` beside the test file; a test with several results
    names each.
    """

    def __init__(self, request: pytest.FixtureRequest) -> None:
        self._update = bool(request.config.getoption("--simulator-update"))
        folder = Path(str(request.config.getini(_DIRECTORY)))
        path = Path(request.path)
        self._folder = path.parent / folder / path.stem
        # the name of a class's test has the class in front
        node = request.node.nodeid.partition("::")[2] or request.node.name
        self._name = _file_name(node)
        self._used: set[str] = set()
        self._updated: list[Path] = []

    def path(self, name: str | None = None) -> Path:
        """The baseline file of the result called `name`."""
        suffix = f".{_file_name(name)}" if name else ""
        return self._folder / f"{self._name}{suffix}.yaml"

    def __call__(
        self,
        result: Any,
        name: str | None = None,
        *,
        tolerance: float | Mapping[str, float] | None = None,
    ) -> None:
        """Fail the test if `result` differs from its baseline, saying what got slower.

        Parameters
        ----------
        result:
            A `simulator.simulation.Result`, an `Experiment`, or the path of an experiment file.
        name:
            Tells the results of one test apart.
        tolerance:
            One relative tolerance, or some of `step_time`, `bubble`, `memory`, `communication`,
            `breakdown`, `operations`, `microbatches` (see `simulator.testing.comparison`).

        Raises
        ------
        AssertionError
            If the result differs by more than the tolerance in either direction, there is no
            baseline yet, or the file is none.
        """
        __tracebackhide__ = True
        from simulator.errors import InputError
        from simulator.testing.baseline import Baseline

        path = self.path(name)
        if str(path) in self._used:
            raise ValueError(f"two results of one test need different names: {path.name}")
        self._used.add(str(path))
        current = Baseline.of(_result(result))
        if self._update:
            current.write(path)
            return
        if not path.exists():
            pytest.fail(
                f"no baseline {path}; write it with: pytest --simulator-update", pytrace=False
            )
        unreadable: InputError | None = None
        try:
            baseline = Baseline.read(path)
        except InputError as error:
            unreadable = error
        if unreadable is not None:  # outside of `except`: pytest would print both
            pytest.fail(
                f"the baseline cannot be read: {unreadable}\n"
                "Restore the file, or write it anew: pytest --simulator-update, and review the "
                "diff.",
                pytrace=False,
            )
        comparison = self._compared(baseline, current, tolerance)
        if not comparison.equal:
            pytest.fail(
                f"the simulated step differs from its baseline {path}\n{comparison.message()}\n"
                "If this is intended: pytest --simulator-update, and review the diff.",
                pytrace=False,
            )

    def compare(
        self,
        result: Any,
        name: str | None = None,
        *,
        tolerance: float | Mapping[str, float] | None = None,
    ) -> Comparison:
        """The differences from the baseline, without failing.

        Raises
        ------
        InputError
            If the file is missing or no baseline.
        """
        from simulator.testing.baseline import Baseline

        baseline = Baseline.read(self.path(name))
        return self._compared(baseline, Baseline.of(_result(result)), tolerance)

    @staticmethod
    def _compared(old: Any, new: Any, tolerance: float | Mapping[str, float] | None) -> Comparison:
        from simulator.testing.comparison import compare

        return compare(old, new, tolerance)


@pytest.fixture
def simulator_baseline(request: pytest.FixtureRequest) -> SimulatorBaseline:
    """Compare simulated steps with stored baselines: `simulator_baseline(result)`."""
    return SimulatorBaseline(request)


def _result(value: Any) -> Any:
    from simulator.experiment import Experiment

    if isinstance(value, Experiment | str | Path):
        from simulator.simulation import run

        return run(value)
    return value


def _file_name(text: str) -> str:
    """`text` with everything but letters, digits, dots and dashes replaced."""
    return re.sub(r"[^\w.-]+", "_", text.replace("::", ".")).strip("_.") or "test"
