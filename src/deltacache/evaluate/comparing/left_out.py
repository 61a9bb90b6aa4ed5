"""What two evaluations do not have in common, in words: settings, horizons, and what only one says of a method."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from deltacache.evaluate.comparing.paired import PairedSeries
from deltacache.evaluate.report.panels import summary_of
from deltacache.evaluate.report.runs import ReportRun, size_of
from deltacache.schemas.foresight import ForesightEvaluation


def differing_settings(runs: Sequence[ReportRun]) -> tuple[str, ...]:
    """Parts of the protocol that are not the same in both, with the value of each."""
    a, b = (_protocol(run) for run in runs)
    return tuple(
        f"{name} {a.get(name, 'none')} and {b.get(name, 'none')}"
        for name in {**a, **b}
        if a.get(name) != b.get(name)
    )


def _protocol(run: ReportRun) -> Mapping[str, str]:
    settings = run.settings
    whole = isinstance(settings, ForesightEvaluation)
    sizes = dict.fromkeys(map(size_of, run.rows))
    protocol = {
        "context": str(settings.context),
        "horizons": _listed(settings.horizons),
        "seed": str(settings.seed),
        "image size": f"{_listed(sizes)} px",
        "backbone": _listed(_values(run, "backbone")),
    }
    return protocol if whole else protocol | {"samples": str(settings.samples)}


def _values(run: ReportRun, column: str) -> list[str]:
    return sorted({str(value) for value in run.metrics[column].to_pylist()})


def only_in_one(held: Sequence[Collection[PairedSeries]], names: Sequence[str]) -> Iterator[str]:
    """A line for the horizons of a data set that one run alone has, and one a method for the rest."""
    missing = [[each for each in held[at] if each not in held[1 - at]] for at in (0, 1)]
    missing = [sorted(each, key=_order) for each in missing]
    horizons = [{(each.dataset, each.horizon) for each in own} for own in held]
    by_method: dict[str, list[str]] = {}
    for at, name in enumerate(names):
        others = horizons[1 - at]
        yield from _whole_horizons(horizons[at] - others, name)
        partly = [each for each in missing[at] if (each.dataset, each.horizon) in others]
        for model in dict.fromkeys(each.model for each in partly):
            parts = _parts([each for each in partly if each.model == model])
            by_method.setdefault(model, []).append(f"only {name} has it{parts}")
    yield from (f"{model}: {'; '.join(parts)}" for model, parts in by_method.items())


def _order(series: PairedSeries) -> tuple[str, str, str, int, int, str]:
    return series.method, series.world, series.dataset, series.horizon, series.num_samples, series.aggregation


def _whole_horizons(found: Iterable[tuple[str, int]], name: str) -> Iterator[str]:
    by_dataset: dict[str, list[int]] = {}
    for dataset, horizon in sorted(found):
        by_dataset.setdefault(dataset, []).append(horizon)
    for dataset, horizons in by_dataset.items():
        yield f"{dataset}, {_horizons(horizons)}: only {name} has {'it' if len(horizons) == 1 else 'them'}"


def _parts(series: Sequence[PairedSeries]) -> str:
    """Summaries of one method, with the horizons of each data set: `` (best of 20; clips, horizons 1, 3)``."""
    summaries = dict.fromkeys(summary_of(each.aggregation, each.num_samples)[2:] for each in series)
    horizons: dict[str, set[int]] = {}
    for each in series:
        horizons.setdefault(each.dataset, set()).add(each.horizon)
    places = [f"{dataset}, {_horizons(sorted(at))}" for dataset, at in horizons.items()]
    return f" ({'; '.join(filter(None, [_listed(filter(None, summaries)), *places]))})"


def _horizons(horizons: Sequence[int]) -> str:
    return f"horizon{'s' if len(horizons) > 1 else ''} {_listed(horizons)}"


def _listed(values: Iterable[object]) -> str:
    return ", ".join(map(str, values))
