"""``benchmarks/mutants.py``: mutants are found in the code, their tests exist; to run them takes half an hour."""

import importlib
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent


def test_every_mutant_is_one_change_of_one_place_with_a_test(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(TESTS.parent / "benchmarks"), *sys.path])
    mutants = importlib.import_module("mutants")
    names = [f"{each.file}: {each.name}" for each in mutants.MUTANTS]
    assert len(names) == len(set(names)) >= 60
    for each in mutants.MUTANTS:
        source = mutants.checked_source(each)  # exits if the text is not there exactly once
        compile(source.replace(each.old, each.new), each.file, "exec")
        assert each.tests, each.name
        for test in each.tests:
            file, _, function = test.partition("::")
            assert (f"def {function}(" if function else "def test_") in (TESTS / file).read_text(), (
                f"{each.name}: {test} is not there"
            )
