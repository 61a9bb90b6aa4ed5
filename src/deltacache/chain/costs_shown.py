"""Costs as tables of plain text."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from deltacache.chain.costs import CostRequest, Costs, SystemCost
from deltacache.chain.costs_published import (
    difference,
    published_backbone,
    published_decoder,
    published_encoder,
    published_predictor,
    published_total,
)
from deltacache.models.costs.counting import Flops

Rows = list[Sequence[str]]
Against = Sequence[tuple[int, str | None]]
"""By the paper's convention, with what was published."""
_PARTS = ("encoder", "decoder", "predictor")


def costs_text(costs: Costs) -> str:
    """Parts, futures of an image, training steps, what was measured, and where the conventions differ."""
    blocks = ["\n".join(costs.notes)] if costs.notes else []
    blocks += [_parts(costs), _futures(costs), _training(costs)]
    if all(row.measured for row in costs.rows):
        blocks.append(_measured(costs))
    return "\n\n".join([*blocks, "\n".join(_differences(costs))])


def _parts(costs: Costs) -> str:
    asked = costs.request
    size = f"{asked.image_size[0]} x {asked.image_size[1]}"
    title = f"GFLOPs of one crop of {size} px ({asked.backbone}); a multiplication and an addition are 2"
    rows: Rows = [("part", "of", "paper's convention", "exact")]
    total = costs.backbone.total
    rows.append(("backbone, a frame", "all", _giga(total), _giga(total)))
    against: list[tuple[int, str | None]] = [(total, published_backbone(asked))]
    merged: dict[_Part, list[str]] = {}
    for row in costs.rows:
        for part in _parts_of(row, asked):
            merged.setdefault(part, []).append(row.system.name)
    for part, names in sorted(merged.items(), key=lambda each: _PARTS.index(each[0].name.split(",")[0])):
        rows.append((part.name, ", ".join(names), _giga(part.paper), _giga(part.exact)))
        against.append((part.paper, part.published))
    return _table(title, _beside_published(rows, against), texts=2)


class _Part(NamedTuple):
    name: str
    paper: int
    exact: int
    published: str | None


def _parts_of(row: SystemCost, asked: CostRequest) -> Iterator[_Part]:
    flops, system = row.flops, row.system
    if flops.encoder != Flops(0):
        total = flops.encoder.total
        yield _Part("encoder, a frame", total, total, published_encoder(asked, system))
    if flops.decoder != Flops(0):
        total = flops.decoder.total
        yield _Part("decoder, a frame", total, total, published_decoder(asked))
    for context, each in flops.predictor.items():
        published = published_predictor(asked, system, context)
        yield _Part(f"predictor, context {context}", each.attention_twice, each.total, published)


def _beside_published(rows: Rows, against: Against) -> Rows:
    """The rows with the paper's numbers, if there are any for them."""
    if not any(published for _, published in against):
        return rows
    cells = [(published or "", difference(flop, published)) for flop, published in against]
    return [(*row, *more) for row, more in zip(rows, [("published", "difference"), *cells], strict=True)]


def _futures(costs: Costs) -> str:
    asked = costs.request
    title = (
        f"GFLOPs of all futures of one image: {asked.crops} crops, context {asked.context}, horizon {asked.horizon}, "
        f"{asked.samples} samples (1 where nothing is random)"
    )
    rows: Rows = [("system", "paper's convention", "exact", "this package")]
    for row in costs.rows:
        found = row.totals
        rows.append((row.system.name, _giga(found.paper), _giga(found.exact), _giga(found.here)))
    against = [(row.totals.paper, published_total(asked, row.system)) for row in costs.rows]
    return _table(title, _beside_published(rows, against))


def _training(costs: Costs) -> str:
    title = (
        f"GFLOPs of a training step of one clip of {costs.request.frames} frames, from cached tokens; frozen: backbone "
        "and encoder, which the cache saves"
    )
    rows: Rows = [
        ("system", "K", "definition", "this package", "relative", "frozen, if online", "cache saves")
    ]
    first = costs.rows[0].flops.step.here
    for row in costs.rows:
        step, frozen = row.flops.step, row.flops.frozen_step.total
        saved = 100 * frozen / (frozen + step.plain)
        numbers = _giga(step.plain), _giga(step.here), f"{step.here / first:.3g}x", _giga(frozen)
        rows.append((row.system.name, str(row.system.candidates), *numbers, f"{saved:.1f} %"))
    return _table(title, rows)


def _measured(costs: Costs) -> str:
    clips = costs.request.batch_size
    step_of = f"a training step of {clips} clip{'s' * (clips > 1)} from cached tokens"
    title = f"Measured here: all futures of one crop from its pixels; {step_of}"
    rows: Rows = [("system", "futures", "memory", "step", "memory", "relative time", "relative memory")]
    first = costs.rows[0].measured
    for row in costs.rows:
        if row.measured is None or first is None:
            continue
        futures, step = row.measured.futures, row.measured.step
        time, memory = step.seconds / first.step.seconds, step.peak_bytes / first.step.peak_bytes
        measured = (
            f"{futures.seconds:.3g} s",
            _mebi(futures.peak_bytes),
            f"{step.seconds:.3g} s",
            _mebi(step.peak_bytes),
        )
        rows.append((row.system.name, *measured, f"{time:.2g}x", f"{memory:.2g}x"))
    return _table(title, rows)


def _differences(costs: Costs) -> Iterator[str]:
    yield "Where they differ"
    if published_backbone(costs.request) is not None:
        yield (
            "- published: Tables B and 2 of the paper (two digits of DeltaWorld's predictor); difference: of what is "
            "counted by its convention"
        )
    for row in costs.rows:
        context, flops = next(iter(row.flops.predictor.items()))
        if flops.attention > 0.01 * flops.total:
            added = f"+{_giga(flops.attention)} at context {context} of {row.system.name}"
            yield f"- the paper's convention counts the attention of predictors twice: {added}"
            break
    yield (
        "- both let each step of each future see its whole context again; this package keeps keys and values, and "
        "those of the context serve all samples"
    )
    if any(row.flops.step.here < row.flops.step.plain for row in costs.rows):
        yield (
            "- definition: every candidate goes through the whole predictor; this package folds the attention around "
            "the candidates of a frame"
        )
    if any(row.flops.encoder != Flops(0) for row in costs.rows):
        yield (
            "- the black frame before a clip is encoded for every training clip, as the online trainer does, and "
            "for no future: its tokens are a constant"
        )


def _giga(flop: int) -> str:
    """Four digits that count, none behind the point from 1,000 on."""
    value = flop / 1e9
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.{4 - len(str(int(value)))}f}" if value >= 0.1 else f"{value:.3g}"


def _mebi(size: int) -> str:
    return f"{size / 2**20:,.3g} MiB" if size < 2**30 else f"{size / 2**30:.3g} GiB"


def _table(title: str, rows: Rows, texts: int = 1) -> str:
    """Aligned columns, the first ``texts`` to the left."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if column < texts else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([title, *(f"  {line}" for line in lines)])
