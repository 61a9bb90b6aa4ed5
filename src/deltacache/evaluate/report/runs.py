"""Evaluations as a report sees them: their tables, their names, and what they were made from."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from deltacache.evaluate import output
from deltacache.evaluate.output import SCENE_TASKS, ModelRecord, read_models, units_text
from deltacache.evaluate.report.panels import METHOD_LABELS
from deltacache.evaluate.settings import BenchmarkEvaluation, ClipEvaluation, Evaluation, load_evaluation
from deltacache.evaluate.statistics import Sums, read_sums
from deltacache.schemas.datasets import parse_size, size_text
from deltacache.schemas.foresight import ForesightEvaluation
from deltacache.schemas.hub import origin_of
from deltacache.schemas.texts import counted

Row = dict[str, Any]


@dataclass(frozen=True)
class ReportRun:
    """One evaluation. ``name`` tells it from the others of the report; empty if it is alone."""

    name: str
    out: Path
    settings: Evaluation
    metrics: pa.Table
    samples: pa.Table
    sums: Sums
    notes: tuple[str, ...]
    models: ModelRecord | None

    @property
    def rows(self) -> list[Row]:
        """Rows of ``metrics.parquet``."""
        return self.metrics.to_pylist()

    @property
    def world_labels(self) -> dict[str, str]:
        """A name for every world model's fingerprint; no two are alike."""
        methods: dict[str, str] = {row["world"]: row["method"] for row in self.rows if row["world"]}
        several = len(set(methods.values())) < len(methods)
        names = self.names
        return {
            world: names.get(
                world, METHOD_LABELS.get(method, method) + (f" ({world[:8]})" if several else "")
            )
            for world, method in methods.items()
        }

    @property
    def names(self) -> dict[str, str]:
        """What the user calls world models and tokenizers, by fingerprint: the ends of their ``places``."""
        places, named = self.places, dict[str, str]()
        for paths in (self.settings.worlds, self.settings.tokenizers):
            own = {fingerprint: path for fingerprint, path in places.items() if path in paths}
            named |= dict(zip(own, place_names(list(own.values())), strict=True))
        return {
            fingerprint: name for fingerprint, name in named.items() if name not in METHOD_LABELS.values()
        }

    @property
    def places(self) -> dict[str, Path]:
        """Paths of tokenizers and world models by fingerprint, as far as it is known which was which.

        Rows are in another order than the settings: of an evaluation without ``models.json`` only a lone one is known.
        """
        found, settings = self.models, self.settings
        tokenizers = found.tokenizers if found else self._lone("tokenizer")
        worlds = found.worlds if found else self._lone("world")
        return _placed(tokenizers, settings.tokenizers) | _placed(worlds, settings.worlds)

    def _lone(self, column: str) -> tuple[str, ...]:
        fingerprints = {row[column] for row in self.rows if row[column]}
        return tuple(fingerprints) if len(fingerprints) == 1 else ()


def _placed(fingerprints: Sequence[str], paths: Sequence[Path]) -> dict[str, Path]:
    return dict(zip(fingerprints, paths, strict=True)) if len(fingerprints) == len(paths) else {}


def open_runs(folders: Sequence[Path]) -> list[ReportRun]:
    """Read the tables of finished evaluations.

    Raises:
        DatasetError: a folder is not the output of an evaluation, or a table is damaged.
        NotFiniteError: an older version wrote numbers that are not finite.
    """
    runs = []
    for name, folder in zip(run_names(folders), folders, strict=True):
        metrics = output.read_metrics(folder)
        older = metrics["unit_kind"].null_count == len(metrics)
        runs.append(
            ReportRun(
                name=name,
                out=folder,
                metrics=metrics,
                settings=load_evaluation(folder),
                samples=output.read_samples(folder),
                sums=read_sums(folder / output.STATISTICS, older=older),
                notes=tuple(output.read_notes(folder)),
                models=read_models(folder),
            )
        )
    return runs


def run_names(folders: Sequence[Path]) -> list[str]:
    """As much of each path's end as tells it from the others; one alone needs no name."""
    if len(folders) == 1:
        return [""]
    return _ends([folder.resolve().parts for folder in folders]) or [
        f"{folder} ({number})" for number, folder in enumerate(folders, 1)
    ]


def _ends(parts: Sequence[Sequence[str]]) -> list[str] | None:
    """As much of each end as tells it from the others; None where two are the same."""
    for length in range(1, max(map(len, parts), default=0) + 1):
        names = ["/".join(each[-length:]) for each in parts]
        if len(set(names)) == len(names):
            return names
    return None if parts else []


_FILES = (".safetensors", ".bin", ".ckpt", ".pt", ".pth")
_NO_NAME = re.compile(r"checkpoints|best|step-\d+|model|pytorch_model|last")


def place_names(paths: Sequence[Path]) -> list[str]:
    """What a user calls models at these paths: the folder of the training, or the name of the file or repository.

    Names of the trainers and of released files (``checkpoints/step-…``, ``model.safetensors``) tell nothing, unless
    they are all in which two paths differ.
    """
    whole = []
    for path in paths:
        origin = origin_of(path)
        place = Path(re.sub("@[0-9a-f]{40}", "", origin.removeprefix("hf://"))) if origin else path.absolute()
        whole.append(place.with_suffix("").parts if place.suffix in _FILES else place.parts)
    short = []
    for parts in whole:
        named = [at for at, part in enumerate(parts) if not _NO_NAME.fullmatch(part)]
        short.append(parts[: max(named, default=0) + 1])
    return _ends(short) or _ends(whole) or [str(path) for path in paths]


def facts_of(run: ReportRun) -> dict[str, str]:
    """What was evaluated and where the numbers come from, by the name of the fact."""
    rows, settings = run.rows, run.settings
    first = rows[0]
    facts = {
        "Data": "; ".join(_data(rows)),
        "Dropped or noted": "; ".join(run.notes) or "nothing",
        "Protocol": f"{counted(first['context'], 'frame')} seen, horizons {', '.join(map(str, settings.horizons))}, "
        f"{_sampling(settings, first)}, seed {first['seed']}",
        "Backbone": first["backbone"],
    }
    through = ("deltatok", "deltatok_parallel", "deltatok_one_step")
    used = dict.fromkeys(row["tokenizer"] for row in rows if row["method"] in through)
    settled = {fingerprint: place for place, fingerprint in enumerate(run.places)}
    tokenizers = sorted(used, key=lambda each: settled.get(each, len(settled)))  # as the settings number them
    for number, text in enumerate(_with_places(tokenizers, run.places), 1):
        facts[f"Tokenizer {number}" if len(tokenizers) > 1 else "Tokenizer"] = text
    labels, methods = run.world_labels, {row["world"]: row["method"] for row in rows}
    for world, text in zip(labels, _with_places(labels, run.places), strict=True):
        method = METHOD_LABELS.get(methods[world], methods[world])
        facts[f"World model {labels[world]}"] = f"{method}, {text}"
    return (
        facts
        | _further_models(settings, run.models)
        | {
            "Run": f"{first['run_id']}, {first['created_at']:%Y-%m-%d %H:%M} UTC, deltacache {first['code_version']}",
        }
    )


def _with_places(fingerprints: Iterable[str], places: Mapping[str, Path]) -> list[str]:
    """Fingerprints with where the models lay, where that is known."""
    return [
        f"{each}, from {origin_of(places[each]) or places[each]}" if each in places else each
        for each in fingerprints
    ]


def _sampling(settings: Evaluation, row: Row) -> str:
    """How many futures there are, and of what size their frames."""
    size = size_of(row).replace("x", " × ")
    if isinstance(settings, ForesightEvaluation):
        return f"one future a model, whole frames of {size} px"
    return f"{counted(settings.samples, 'sample')}, {size} px"


def size_of(row: Row) -> str:
    """``512`` or ``448x896`` of a row of ``metrics.parquet``; an older version kept the height alone."""
    width = row["image_width"] or row["image_size"]
    return size_text(parse_size((row["image_size"], width)))


def _further_models(settings: Evaluation, models: ModelRecord | None) -> dict[str, str]:
    """What else took part: heads, a decoder of pictures and a PCA, or the features themselves."""
    if isinstance(settings, ClipEvaluation):
        futures = {} if settings.futures is None else {"Futures from": str(settings.futures)}
        return {"Features from": settings.features, **futures}
    facts = {
        f"Head for {name}": f"{models.head_text(name)}, from {head}" if models else str(head)
        for name, head in settings.heads.items()
    }
    if isinstance(settings, BenchmarkEvaluation):
        if models and models.rgb_decoder:
            facts["Decoder of pictures"] = f"{models.rgb_decoder}, from {settings.rgb_decoder}"
        return facts
    if settings.depth is not None:
        facts["Depth maps from"] = str(settings.depth)
    if models and models.pca:
        facts["PCA"] = f"{models.pca}, from {settings.features.pca}"
    return facts


def _data(rows: Sequence[Row]) -> list[str]:
    """Each data set with its sequences and their units; fewer at some horizons are given as a range."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row["task"] not in SCENE_TASKS:
            found.setdefault(row["dataset"], []).append(row)
    texts = []
    for dataset, own in found.items():
        low, high = (pick(row["n_sequences"] for row in own) for pick in (min, max))
        number = f"{high}" if low == high else f"{low} to {high}, by horizon,"
        text = f"{dataset}: {number} sequence{'s' if high != 1 else ''}"
        most = max((row["n_units"] or 0 for row in own), default=0)
        texts.append(f"{text} of {units_text(most, own[0]['unit_kind'])}" if most else text)
    return texts
