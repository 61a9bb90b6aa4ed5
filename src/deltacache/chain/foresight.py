"""Table D's evaluation, and its table on the terminal."""

from rich.console import Console

from deltacache.evaluate.foresight.run import evaluate_foresight
from deltacache.evaluate.output import read_metrics
from deltacache.evaluate.report.tables import print_metrics
from deltacache.schemas.foresight import ForesightEvaluation
from deltacache.schemas.progress import Reporter


def evaluate_foresight_and_show(settings: ForesightEvaluation, reporter: Reporter) -> None:
    """Evaluate and print."""
    metrics = evaluate_foresight(settings, reporter)
    print_metrics(read_metrics(metrics), Console())
    reporter.line(f"tables: {metrics}")
