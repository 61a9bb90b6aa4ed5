"""Models remember layers and PCA of their features; tokens of equal width and another meaning are refused by name."""

from pathlib import Path
from typing import Any

import drawn
import pytest

from deltacache.evaluate.inputs import check_tokenizer
from deltacache.models.checkpoints import load_tokenizer
from deltacache.pipeline.work.workers import check_tokenizer_fits
from deltacache.schemas.datasets import BackboneCard
from deltacache.schemas.errors import MismatchError
from deltacache.schemas.progress import SilentReporter
from trainers import train_tokenizer

FIRST, SECOND, PCA = {"layers": (0,)}, {"layers": (1,)}, {"layers": (0,), "pca_fingerprint": "ab" * 8}
CHOICES: dict[str, dict[str, Any]] = {"last": {}, "first": FIRST, "second": SECOND, "pca": PCA}
SAID = {
    "last": "the last hidden state without PCA",
    "first": "layers 0 without PCA",
    "second": "layers 1 without PCA",
    "pca": "layers 0 reduced by PCA abababababababab",
}


def features_of(root: Path, choice: str, **changes: Any) -> Path:
    """The same drawn tokens, said to be made another way."""
    plain = drawn.drawn_card

    def card(kind: Any, frames: int) -> Any:
        made = plain(kind, frames)
        backbone = BackboneCard(**{**made.backbone.model_dump(), **CHOICES[choice]})
        return made.model_copy(update={"backbone": backbone, **changes})

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(drawn, "drawn_card", card)
        return drawn.write_dataset(root, "features", drawn.drawn_features(8, 4))


def train(features: Path, out: Path, start_from: Path | None = None, *, resume: bool = False) -> Path:
    """Two steps."""
    config = drawn.tokenizer_config(start="weights" if start_from else "random", steps=2)
    options = {"resume": resume, "device": "cpu", "reporter": SilentReporter(), "start_from": start_from}
    train_tokenizer(features, out, config, **options)
    return out


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Features of each choice, and a tokenizer trained on them."""
    root = tmp_path_factory.mktemp("made")
    features = {choice: features_of(root / choice / "features", choice) for choice in CHOICES}
    return {choice: (place, train(place, root / choice / "out")) for choice, place in features.items()}


@pytest.mark.parametrize("made_for", list(CHOICES))
@pytest.mark.parametrize("used", list(CHOICES))
def test_tokenizers_fit_their_own_features_alone(
    made_for: str, used: str, made: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    (features, out), (others, _) = made[made_for], made[used]
    loaded, card = load_tokenizer(out), drawn_card_of(others)
    assert {
        name: loaded.metadata.get(name) for name in ("layers", "pca_fingerprint") if name in loaded.metadata
    } == (drawn_card_of(features).backbone.choice)
    if made_for == used:
        check_tokenizer_fits(loaded, card, out)
        check_tokenizer(loaded, card, out, str(others))
        train(features, out, resume=True)
        train(others, tmp_path / "further", out)
        return
    message = f"was trained on {SAID[made_for]}, but .* has {SAID[used]}: use the same --layers and --pca"
    with pytest.raises(MismatchError, match=message):
        check_tokenizer_fits(loaded, card, out)
    with pytest.raises(MismatchError, match=message):
        check_tokenizer(loaded, card, out, str(others))
    with pytest.raises(MismatchError, match=r"does not belong to this stage \((layers|pca_fingerprint) was"):
        train(others, tmp_path / "further", out)


def test_a_released_tokenizer_says_nothing_and_is_taken(made: dict[str, tuple[Path, Path]]) -> None:
    _, out = made["last"]
    loaded = load_tokenizer(out)
    released = type(loaded)(loaded.model, loaded.fingerprint, {"kind": "tokenizer"})
    check_tokenizer_fits(released, drawn_card_of(made["pca"][0]), out)


def test_rectangles_are_remembered_and_resumed(tmp_path: Path) -> None:
    """What JSON makes of a pair compares equal to the pair."""
    features = features_of(tmp_path / "features", "last", image_size=(16, 64), patch_grid=(1, 4))
    out = train(features, tmp_path / "tokenizer")
    assert load_tokenizer(out).metadata["image_size"] == [16, 64]
    train(features, out, resume=True)


def drawn_card_of(root: Path) -> Any:
    """Its ``dataset.json``."""
    from deltacache.pipeline.datasets.dataset import open_dataset

    return open_dataset(root).card
