"""Do the tests notice when a line that decides a number is wrong?

    python benchmarks/mutants.py                  all mutants; exit code 1 if one survives
    python benchmarks/mutants.py winner interval  those whose name or file contains one of the words
    python benchmarks/mutants.py --jobs 4

A mutant is one small change of one line: another loss, another winner, another unit, another order. Each is made in a
copy of the tree, never in the tree itself, and the tests named beside it run there. Killed: a test fails. Survived: all
pass, so nothing would notice that mistake. The named tests also run once without any change: they must pass, or a
mutant would be killed by nothing. A mutant whose text is not found exactly once stops the run: the code has moved, so
move the mutant with it.

Choose the smallest selection of tests that kills a mutant: what it costs is paid for each of them.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Queue

ROOT = Path(__file__).resolve().parent.parent
_LIMIT_S = 600  # of one selection of tests: what hangs is no mistake that a test noticed


@dataclass(frozen=True, slots=True)
class Mutant:
    """One wrong line.

    Attributes:
        name: what would be wrong, in a few words.
        file: below ``src/deltacache``.
        old: the exact text; it must be in the file exactly once.
        new: what takes its place.
        tests: what is given to pytest, below ``tests``: a file, or a file and ``::test``.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


# Losses, winners, aggregation, intervals, geometry, models.
NUMBERS = (
    Mutant(
        "smooth-L1 with another beta",
        "evaluate/metrics.py",
        "SMOOTH_L1_BETA = 0.1",
        "SMOOTH_L1_BETA = 1.0",
        ("evaluate/test_evaluate_metrics.py",),
    ),
    Mutant(
        "pixels that are ignored are counted",
        "evaluate/benchmarks/scales.py",
        "valid = labels != IGNORE",
        "valid = labels >= 0",
        ("evaluate/test_pooled.py",),
    ),
)

# Schedules, order, splits, fingerprints, selection.
TRAINING = (
    Mutant(
        "the same order in every epoch",
        "train/order.py",
        'step_rng("order", seed, epoch)',
        'step_rng("order", seed, 0)',
        ("train/test_order.py",),
    ),
)

MUTANTS = NUMBERS + TRAINING


def copy_of_tree(folder: Path) -> Path:
    """The files that git knows or would add, as they are now, in ``folder``; golden numbers stay where they are."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    tree = folder / "tree"
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file() and not (ROOT / name).is_symlink():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, tree / name)
    shared = ROOT.parent / "shared"
    if shared.exists():
        (folder / "shared").symlink_to(shared.resolve())
    return tree


def run_tests(tree: Path, tests: Sequence[str]) -> tuple[int, str]:
    """pytest's exit code and the end of what it printed; 0 passed, 1 failed, anything else is neither."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--no-header"]
    try:
        done = subprocess.run(
            [*command, *(f"tests/{each}" for each in tests)],
            cwd=tree,
            env={**os.environ, "PYTHONPATH": str(tree / "src"), "PYTHONDONTWRITEBYTECODE": "1"},
            capture_output=True,
            text=True,
            timeout=_LIMIT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return -1, f"no result within {_LIMIT_S} s"
    return done.returncode, (done.stdout + done.stderr)[-3000:]


def checked_source(mutant: Mutant) -> str:
    """The file that the mutant changes."""
    source = (ROOT / "src" / "deltacache" / mutant.file).read_text(encoding="utf-8")
    if source.count(mutant.old) != 1 or mutant.old == mutant.new:
        sys.exit(
            f"{mutant.name}: {mutant.old!r} is {source.count(mutant.old)} times in {mutant.file}, must be there once: "
            "move the mutant with the code"
        )
    return source


def judge(mutant: Mutant, tree: Path) -> tuple[str, str]:
    """``killed``, ``SURVIVED`` or ``BROKEN`` (no test ran to its end), and what pytest printed."""
    source = checked_source(mutant)
    place = tree / "src" / "deltacache" / mutant.file
    place.write_text(source.replace(mutant.old, mutant.new), encoding="utf-8")
    try:
        code, text = run_tests(tree, mutant.tests)
    finally:
        place.write_text(source, encoding="utf-8")
    return {0: "SURVIVED", 1: "killed"}.get(code, "BROKEN"), text


def main() -> None:
    """Run the mutants that the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("words", nargs="*", help="run mutants whose name or file contains one of these")
    parser.add_argument("--jobs", type=int, default=1, help="copies of the tree that are tested side by side")
    asked = parser.parse_args()
    wanted = [
        each
        for each in MUTANTS
        if not asked.words or any(word in f"{each.name} {each.file}" for word in asked.words)
    ]
    for each in wanted:
        checked_source(each)
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        trees: Queue[Path] = Queue()
        for number in range(asked.jobs):
            place = Path(folder) / str(number)
            place.mkdir()
            trees.put(copy_of_tree(place))

        def passes(tests: tuple[str, ...]) -> tuple[str, ...] | None:
            tree = trees.get()
            code, text = run_tests(tree, tests)
            trees.put(tree)
            if code:
                print(f"without a mutant, {' '.join(tests)} must pass:\n{text}", flush=True)
            return None if code else tests

        def judged(mutant: Mutant) -> str:
            tree, started = trees.get(), time.perf_counter()
            verdict, text = judge(mutant, tree)
            trees.put(tree)
            print(
                f"{verdict:9}{time.perf_counter() - started:6.0f} s  {mutant.file}: {mutant.name}", flush=True
            )
            if verdict == "BROKEN":
                print(text, flush=True)
            return verdict

        with ThreadPoolExecutor(asked.jobs) as pool:
            if None in list(pool.map(passes, dict.fromkeys(each.tests for each in wanted))):
                sys.exit(1)
            verdicts = list(pool.map(judged, wanted))
    print(
        f"{len(verdicts)} mutants: {verdicts.count('killed')} killed, {len(verdicts) - verdicts.count('killed')} not"
    )
    sys.exit(0 if set(verdicts) <= {"killed"} else 1)


if __name__ == "__main__":
    main()
