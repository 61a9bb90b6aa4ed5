"""Taking out of a dataset exactly what is damaged, so that the command that made it makes just that again."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from deltacache.pipeline.datasets.dropping import drop_shards, settle
from deltacache.pipeline.datasets.finishing import TABLES_FILE
from deltacache.pipeline.datasets.folding import PARTS
from deltacache.pipeline.datasets.plan import PLAN_FILE, write_plan
from deltacache.pipeline.datasets.plan_checks import plan_of_receipts
from deltacache.pipeline.datasets.preparation import DATASET_FILES, is_dataset, read_card
from deltacache.pipeline.datasets.problems import Problem, Remedy
from deltacache.pipeline.datasets.receipts import RECEIPTS, SHARDS, finished_shards
from deltacache.pipeline.datasets.verification import verify_dataset
from deltacache.pipeline.storage.atomic import readable_errors, remove, remove_leftovers
from deltacache.pipeline.storage.locking import dataset_lock
from deltacache.pipeline.storage.storage import AnyPath, dataset_root, names_in
from deltacache.schemas.progress import Reporter


@dataclass(frozen=True, slots=True)
class RepairAction:
    """One thing that was done: to a file, a shard's id or a folder, relative to the dataset."""

    target: str
    what: str

    def __str__(self) -> str:
        return f"{self.target}: {self.what}"


@dataclass(frozen=True, slots=True)
class Repair:
    """What was wrong, what was done, and what was left alone because it may be the user's.

    Attributes:
        left: files that the dataset's commands did not make.
    """

    root: AnyPath
    problems: list[Problem]
    actions: list[RepairAction] = field(default_factory=list)
    left: list[str] = field(default_factory=list)

    @property
    def unfinished(self) -> bool:
        """Whether the command that made the dataset has something to do."""
        return any(problem.remedy is not Remedy.LEAVE for problem in self.problems)

    def __str__(self) -> str:
        lines = [*map(str, self.problems), *(f"repaired: {action}" for action in self.actions)]
        lines += [f"left alone, not made by deltacache: {name}" for name in self.left]
        if self.unfinished:
            lines.append(f"{self.root}: run the command that made it again, which makes what is missing")
        else:
            lines.append(f"{self.root}: nothing to repair")
        return "\n".join(lines)


def repair_dataset(root: AnyPath | str, reporter: Reporter | None = None) -> Repair:
    """Verify a dataset and remove what is damaged; all else stays untouched.

    The plan is the one thing that is not removed but made again, from the receipts: with the ids, a rerun
    finds the finished shards. Nothing outside the dataset's folder is ever removed, nor a file in it that
    the commands did not make.

    Raises:
        DatasetError: there is no dataset, or a command is writing to it.
        StorageError: its place refuses or does not answer.
    """
    root = dataset_root(root)
    if not set(names_in(root)) & DATASET_FILES:
        read_card(root)  # says that this is none, before a lock is put there
    with dataset_lock(root, "verify --repair"):
        if is_dataset(root) or finished_shards(root):
            settle(root)
        repair = Repair(root, verify_dataset(root, reporter), left=_foreign(root))
        with readable_errors(root):
            repair.actions.extend(_repair(root, repair.problems))
        strange = [problem.file for problem in repair.problems if problem.remedy is Remedy.LEAVE]
        repair.left.extend(name for name in strange if (root / name).exists())
    return repair


def _repair(root: AnyPath, problems: list[Problem]) -> Iterable[RepairAction]:
    by_remedy = {remedy: [p for p in problems if p.remedy is remedy] for remedy in Remedy}
    if by_remedy[Remedy.REBUILD_PLAN]:  # first: the receipts of damaged shards still say their videos
        yield _rebuild_plan(root)
    dropped = sorted({problem.shard_id for problem in by_remedy[Remedy.DROP_SHARD] if problem.shard_id})
    drop_shards(root, dropped)
    for shard_id in dropped:
        yield RepairAction(f"shard {shard_id}", "dropped with its receipt")
    removed = {problem.file for remedy in (Remedy.REMOVE, Remedy.MERGE) for problem in by_remedy[remedy]}
    if by_remedy[Remedy.MERGE] or by_remedy[Remedy.REBUILD_PLAN] or dropped:
        remove(root / TABLES_FILE)
        removed.discard(TABLES_FILE)
        yield RepairAction(TABLES_FILE, "removed, so that the tables are merged again")
    for name in sorted(removed):
        if (root / name).exists():
            remove(root / name)
            yield RepairAction(name, "removed")
    if by_remedy[Remedy.REWRITE_GROUP]:
        yield _rewrite_group(root)
    if by_remedy[Remedy.SWEEP]:
        for folder in (root, root / RECEIPTS, root / SHARDS, root / PARTS):
            if folder == root or folder.exists():
                remove_leftovers(folder)
        yield RepairAction(".", "what dead commands left was removed")


def _rebuild_plan(root: AnyPath) -> RepairAction:
    plan = plan_of_receipts(root)
    remove(root / PLAN_FILE)
    if plan.num_rows:
        write_plan(root, plan)
    shards = len(plan["shard"].unique())
    return RepairAction(PLAN_FILE, f"made again from the receipts of {shards} shards")


def _rewrite_group(root: AnyPath) -> RepairAction:
    from deltacache.pipeline.datasets.zarr_store import ensure_root  # zarr is imported only where it is used

    remove(root / SHARDS / "zarr.json")
    ensure_root(root / SHARDS)
    return RepairAction(f"{SHARDS}/zarr.json", "written again")


def _foreign(root: AnyPath) -> list[str]:
    return [name for name in names_in(root) if name not in DATASET_FILES and not name.startswith(".tmp-")]
