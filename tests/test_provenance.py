"""Whether a model belongs to tokens: one check, whose message names both sides and the way out."""

from dataclasses import replace
from typing import Any

import pytest

from deltacache.schemas.errors import MismatchError
from deltacache.schemas.provenance import Provenance, require_matches

MADE = "5e" * 32
FEATURES = Provenance("features/", 64, MADE, "tiny", {"layers": [0, 2]}, (2, 2), 32)
MODEL = replace(FEATURES, name="the tokenizer t")
WAY_OUT = "load the matching tokenizer"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"hidden_size": 96},
            "features/ has 96-wide tokens of tiny at 32 px, but the tokenizer t expects 64: load the matching",
        ),
        (
            {"backbone_sha256": "00" * 32},
            "t was trained on features of backbone 5e5e5e5e5e5e5e5e, but features/ has those of 0000000000000000 "
            r"\(tiny\): load the matching",
        ),
        (
            {"selection": {}},
            "on layers 0,2 without PCA, but features/ has the last hidden state without PCA: use",
        ),
        (
            {"selection": {"layers": [0, 2], "pca_fingerprint": "ab"}},
            "on layers 0,2 without PCA, but features/ has layers 0,2 reduced by PCA ab: use the same --layers",
        ),
        (
            {"patch_grid": (4, 2)},
            r"2 x 2 patches per frame, but features/ has 4 x 2 \(32 px\): use its image size",
        ),
    ],
)
def test_both_sides_and_the_way_out_are_named(given: dict[str, Any], message: str) -> None:
    require_matches(MODEL, FEATURES, WAY_OUT)
    with pytest.raises(MismatchError, match=message):
        require_matches(MODEL, replace(FEATURES, **given), WAY_OUT)


def test_image_sizes_may_differ_where_it_is_said_and_known() -> None:
    larger = replace(FEATURES, patch_grid=(4, 4), image_size=64)
    require_matches(MODEL, larger, WAY_OUT, any_size=True)
    with pytest.raises(MismatchError, match="4 x 4"):
        require_matches(MODEL, larger, WAY_OUT)
    with pytest.raises(MismatchError, match="4 x 4"):
        require_matches(MODEL, replace(larger, image_size=None), WAY_OUT, any_size=True)


def test_delta_tokens_of_another_tokenizer_are_refused() -> None:
    world = Provenance.of_checkpoint({"tokenizer_fingerprint": "aa"}, 64, "the world model w")
    require_matches(world, Provenance("the tokenizer t", 64, tokenizer_fingerprint="aa"), WAY_OUT)
    with pytest.raises(
        MismatchError, match="w was trained on delta tokens of tokenizer aa, but the tokenizer t is bb"
    ):
        require_matches(world, Provenance("the tokenizer t", 64, tokenizer_fingerprint="bb"), WAY_OUT)


def test_a_released_checkpoint_says_its_width_alone() -> None:
    released = Provenance.of_checkpoint({"kind": "tokenizer"}, 64, "the tokenizer r")
    require_matches(released, FEATURES, WAY_OUT)
    with pytest.raises(MismatchError, match="expects 64"):
        require_matches(released, replace(FEATURES, hidden_size=32), WAY_OUT)


def test_a_checkpoint_says_what_its_dataset_said() -> None:
    metadata = {"backbone_sha256": MADE, "layers": [0, 2], "patch_grid": [2, 2], "image_size": 32}
    require_matches(Provenance.of_checkpoint(metadata, 64, "m"), FEATURES, WAY_OUT)
    unselected = {**metadata, "layers": None, "pca_fingerprint": None}
    require_matches(Provenance.of_checkpoint(unselected, 64, "m"), replace(FEATURES, selection={}), WAY_OUT)
