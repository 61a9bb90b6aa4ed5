"""The paper's numbers, to stand beside those that are counted: Table B for a part, Table 2 for all futures."""

from deltacache.chain.costs import CostRequest
from deltacache.models.costs.backbones import short_name
from deltacache.models.costs.systems import System

# GFLOPs with the digits that were published: of one crop of 256 px, ViT-B/16.
_BACKBONE, _ENCODER, _DECODER = "47.185", "96.930", "46.12"
_OF_DELTAS = {4: "0.26", 5: "0.28", 6: "0.31"}
_OF_PATCHES = {4: "84.88", 5: "96.96", 6: "109.04"}
# Of two crops, context 4, three steps, 20 samples.
_TOTALS = {"dino-world": "959", "best-of-many": "12,013", "frame-tokens": "6,315", "delta-tokens": "6,721"}
_PRESETS = {"released", "paper", "table2", *_TOTALS}


def published_backbone(request: CostRequest) -> str | None:
    """Of a frame."""
    return _BACKBONE if _in_table_b(request) else None


def published_encoder(request: CostRequest, system: System) -> str | None:
    """Of a frame, by delta compression."""
    delta = system.tokenizer is not None and system.tokenizer.frame_compression == "off"
    return _ENCODER if _in_table_b(request) and delta else None


def published_decoder(request: CostRequest) -> str | None:
    """Of a frame."""
    return _DECODER if _in_table_b(request) else None


def published_predictor(request: CostRequest, system: System, context: int) -> str | None:
    """Of one predicted frame."""
    if not _in_table_b(request):
        return None
    return (_OF_PATCHES if system.tokenizer is None else _OF_DELTAS).get(context)


def published_total(request: CostRequest, system: System) -> str | None:
    """Of all futures of an image."""
    asked = request.context, request.horizon, request.samples, request.crops
    return _TOTALS.get(system.name) if _in_table_b(request) and asked == (4, 3, 20, 2) else None


def difference(flop: int, published: str | None) -> str:
    """Of the counted number from the published one, in per cent."""
    return "" if published is None else f"{100 * (flop / 1e9 / float(published.replace(',', '')) - 1):+.2f} %"


def _in_table_b(request: CostRequest) -> bool:
    """The models of the paper, on its crops. K and frames of a clip do not matter for futures."""
    return (
        request.preset in _PRESETS
        and short_name(request.backbone) == "vitb16"
        and request.hidden_size in (None, 768)
        and request.heads in (None, 12)
        and request.image_size == (256, 256)
    )
