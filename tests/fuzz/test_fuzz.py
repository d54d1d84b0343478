"""A quick part of the fuzzing; `benchmarks/fuzz.py` does the whole."""

from __future__ import annotations

import pytest

from simulator.errors import InputError

from .harness import Hang, Reader, fuzz
from .readers import readers

#: Mutations of all readers together.
QUICK = 2_000
READERS = readers()
_SHARE = QUICK / sum(reader.weight for reader in READERS)


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.name)
def test_broken_files_give_a_result_or_a_clean_error(reader: Reader) -> None:
    count = round(_SHARE * reader.weight)
    tally = fuzz(reader, range(count))
    assert tally.findings == {}, "\n".join(tally.samples.values())
    assert tally.total == count
    # the mutations reach both the reader's errors and what comes after them
    assert tally.clean_errors > 0


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.name)
def test_the_seeds_are_valid(reader: Reader, tmp_path) -> None:  # type: ignore[no-untyped-def]
    for seed in reader.seeds:
        path = tmp_path / f"seed{reader.suffix}"
        path.write_bytes(seed)
        try:
            reader.read(path)
        except InputError:
            if reader.name != "texts":  # no text is valid as all of them
                raise


def test_the_harness_sees_what_it_looks_for() -> None:
    def crash(path):  # type: ignore[no-untyped-def]
        raise KeyError(path.name)

    def hang(path):  # type: ignore[no-untyped-def]
        while True:
            pass

    def escape(path):  # type: ignore[no-untyped-def]
        import os

        os.system("true")

    def silent(path):  # type: ignore[no-untyped-def]
        raise InputError("")

    found = {
        function.__name__: fuzz(
            Reader("self", "text", ".txt", [b"a"], function), range(2), limit=1
        ).findings
        for function in (crash, hang, escape, silent)
    }
    assert [next(iter(findings)).split()[0] for findings in found.values()] == [
        "KeyError", "hang:", "RuntimeError", "an",
    ]  # fmt: skip
    assert any("code execution" in what for what in found["escape"])
    assert issubclass(Hang, BaseException)
