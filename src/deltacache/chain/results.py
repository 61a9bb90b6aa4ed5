"""What a person sees at the end: tables on the terminal, the report, and what a folder holds."""

from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from upath import UPath

from deltacache.chain.terminal import duration
from deltacache.evaluate.clips import evaluate_clips
from deltacache.evaluate.output import METRICS, read_metrics
from deltacache.evaluate.report import ReportInput, clips_to_show, write_report
from deltacache.evaluate.settings import ClipEvaluation
from deltacache.evaluate.tables import print_metrics
from deltacache.models.checkpoints import load_tokenizer, load_world
from deltacache.pipeline.dataset import open_dataset
from deltacache.pipeline.inspection import describe
from deltacache.pipeline.locking import read_lock
from deltacache.pipeline.pixels import clip_pixels
from deltacache.pipeline.preparation import is_dataset
from deltacache.pipeline.storage import dataset_root
from deltacache.schemas.configs import load_config
from deltacache.schemas.errors import CheckpointError, DeltacacheError
from deltacache.schemas.progress import Reporter


def evaluate_and_show(settings: ClipEvaluation, reporter: Reporter) -> Path:
    """Evaluate, write the report, print the table; returns the report's path."""
    evaluate_clips(settings, reporter)
    return show_results(settings.out, reporter)


def show_results(evaluation: Path, reporter: Reporter) -> Path:
    """Write the report of a finished evaluation and print its table and where the report is."""
    settings = load_config(evaluation / "config.yaml", ClipEvaluation)
    dataset = open_dataset(settings.features, "features")
    pixels = dict(clip_pixels(dataset, clips_to_show(evaluation)))
    report = write_report(ReportInput(evaluation, pixels))
    print_metrics(read_metrics(evaluation), Console())
    reporter.line(f"tables: {evaluation / METRICS}")
    reporter.line(f"report: {report.resolve()}")
    return report


def describe_output(place: str | Path) -> str:
    """What lies at ``place``: a dataset, a checkpoint or training output, or an evaluation.

    Raises:
        DeltacacheError: it is none of these.
    """
    if is_dataset(place):
        root = dataset_root(place)
        return "\n".join([str(describe(root)), *_running(root)])
    path = Path(place)
    if (path / METRICS).is_file():
        metrics = read_metrics(path)
        return f"{path}: an evaluation, {metrics.num_rows} numbers; report: {path / 'report.html'}"
    if not path.exists():
        raise DeltacacheError(f"{path} does not exist: give the output folder of one of the commands")
    return _describe_checkpoint(path)


def _running(root: UPath) -> Iterator[str]:
    """What a command that is writing to a dataset says of itself."""
    lock = read_lock(root)
    if lock is None:
        return
    where = f"process {lock.pid} on {lock.host}, since {lock.started_at:%Y-%m-%d %H:%M:%S} UTC"
    if not lock.alive:
        yield f"  stopped      {lock.command} ({where}) has died: run it again"
        return
    yield f"  running      {lock.command} ({where})"
    status = lock.status
    if "planned_clips" in status:
        left = status["seconds_left"]
        yield (
            f"               {status['clips']} of {status['planned_clips']} clips of this run, "
            f"{status['clips_per_s']:.1f} clips/s, {status['failed_videos']} videos refused, "
            f"{'time left not known yet' if left is None else duration(left) + ' left'}"
        )


def _describe_checkpoint(path: Path) -> str:
    try:
        loaded = load_tokenizer(path)
    except CheckpointError as not_a_tokenizer:
        try:
            loaded = load_world(path)
        except CheckpointError:
            raise not_a_tokenizer from None
    parameters = sum(tensor.numel() for tensor in loaded.model.parameters())
    made_from = {
        name: value
        for name, value in loaded.metadata.items()
        if name.endswith(("fingerprint", "sha256", "step", "image_size", "code_version"))
    }
    lines = [
        f"{path}: {type(loaded.model).__name__}, {parameters / 1e6:.2f} M parameters",
        f"  fingerprint  {loaded.fingerprint}",
        *(f"  {name}  {value}" for name, value in made_from.items()),
    ]
    return "\n".join(lines)
