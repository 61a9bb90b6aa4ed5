"""What a person sees at the end: tables on the terminal, and the report."""

from pathlib import Path

from rich.console import Console

from deltacache.evaluate.benchmarks.engine import evaluate_benchmarks
from deltacache.evaluate.clips.run import evaluate_clips
from deltacache.evaluate.foresight.run import evaluate_foresight
from deltacache.evaluate.output import METRICS
from deltacache.evaluate.report.page import ReportInput, clips_to_show, write_report
from deltacache.evaluate.report.runs import open_runs
from deltacache.evaluate.report.tables import print_metrics
from deltacache.evaluate.settings import BenchmarkEvaluation, ClipEvaluation, Evaluation, load_evaluation
from deltacache.pipeline.datasets.dataset import open_dataset
from deltacache.pipeline.decoding.pixels import clip_pixels
from deltacache.schemas.foresight import ForesightEvaluation
from deltacache.schemas.progress import Reporter


def run_evaluation(settings: Evaluation, reporter: Reporter) -> None:
    """Write the tables of an evaluation, whatever it is of."""
    if isinstance(settings, BenchmarkEvaluation):
        evaluate_benchmarks(settings, reporter)
    elif isinstance(settings, ForesightEvaluation):
        evaluate_foresight(settings, reporter)
    else:
        evaluate_clips(settings, reporter)


def evaluate_and_show(settings: Evaluation, reporter: Reporter) -> Path:
    """Evaluate, write the report, print the table; returns the report's path."""
    run_evaluation(settings, reporter)
    return show_results(settings.out, reporter)


def show_results(evaluation: Path, reporter: Reporter) -> Path:
    """Write the report of a finished evaluation and print its table and where the report is."""
    settings = load_evaluation(evaluation)
    clips = settings.clips if isinstance(settings, BenchmarkEvaluation) else settings
    pixels = None
    if isinstance(clips, ClipEvaluation):  # benchmarks keep frames of their examples, clips are decoded again
        dataset = open_dataset(clips.features, "features")
        held = set(dataset.clip_ids)
        pixels = dict(clip_pixels(dataset, [name for name in clips_to_show(evaluation) if name in held]))
    report = write_report(ReportInput(evaluation, pixels))
    (run,) = open_runs([evaluation])
    print_metrics(run.metrics, Console(), run.names)
    reporter.line(f"tables: {evaluation / METRICS}")
    reporter.line(f"report: {report.resolve()}")
    return report
