"""The streamed PCA against a batch one of numpy, and a file that must be whole."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from deltacache.models.pca import Moments, Pca, check_pca, load_pca, principal_components, save_pca
from deltacache.schemas.errors import CheckpointError, DeltacacheError, MismatchError

VECTORS, CHANNELS = 700, 24


def drawn(vectors: int = VECTORS, channels: int = CHANNELS, seed: int = 0) -> np.ndarray:
    """Correlated channels of very different means and sizes, rounded to float16 as features are."""
    rng = np.random.default_rng(seed)
    mixed = rng.normal(size=(vectors, channels)) @ rng.normal(size=(channels, channels))
    scales, means = 10.0 ** rng.uniform(-2, 2, channels), rng.uniform(-30, 30, channels)
    return (mixed * scales + means).astype(np.float16).astype(np.float64)


def streamed(vectors: np.ndarray, parts: int) -> Moments:
    moments = Moments.empty(vectors.shape[1])
    for part in np.array_split(vectors, parts):
        moments.merge(Moments.of(torch.from_numpy(part).half()))
    return moments


def batch_pca(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Components (D, D), largest first, and their variances, of all standardised vectors at once."""
    standardised = (vectors - vectors.mean(0)) / vectors.std(0)
    _, sizes, components = np.linalg.svd(standardised, full_matrices=False)
    return components, sizes**2 / len(vectors)


def up_to_sign(components: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    signs = np.sign((components * wanted).sum(1, keepdims=True))
    return np.abs(components * signs - wanted).max()


@pytest.mark.parametrize("parts", [1, 7, 60, VECTORS])
def test_equal_to_a_batch_pca(parts: int) -> None:
    vectors = drawn()
    moments = streamed(vectors, parts)
    assert moments.count == VECTORS
    np.testing.assert_allclose(moments.mean, vectors.mean(0), rtol=1e-12)
    np.testing.assert_allclose(moments.std, vectors.std(0), rtol=1e-10)
    np.testing.assert_allclose(moments.scatter / VECTORS, np.cov(vectors.T, bias=True), rtol=1e-8, atol=1e-8)
    pca = principal_components(moments, 10)
    components, variances = batch_pca(vectors)
    assert up_to_sign(pca.components.double().numpy(), components[:10]) < 1e-6
    np.testing.assert_allclose(pca.explained_variance, variances[:10], rtol=1e-6)
    assert pca.explained == pytest.approx(variances[:10].sum() / CHANNELS, rel=1e-6)
    assert variances.sum() == pytest.approx(CHANNELS)


def test_large_means_lose_no_digits() -> None:
    """The usual sums of squares would: 1e-3 around 1e3 is beyond float64's digits once squared and summed."""
    rng = np.random.default_rng(1)
    vectors = rng.normal(size=(5000, 3)) * 1e-4 + np.array([1e5, -1e4, 1e3])
    moments = Moments.empty(3)
    for part in np.array_split(vectors, 50):
        moments.merge(Moments.of(torch.from_numpy(part)))
    np.testing.assert_allclose(moments.std, vectors.std(0), rtol=1e-5)


def test_moments_of_parts_merge_in_any_order() -> None:
    vectors = torch.from_numpy(drawn())
    parts = [Moments.of(part) for part in vectors.split([3, 400, 1, 296])]
    right = Moments.empty(CHANNELS)
    for part in reversed(parts):
        right.merge(part)
    whole = Moments.of(vectors)
    for name in ("mean", "scatter", "low", "high"):
        torch.testing.assert_close(getattr(right, name), getattr(whole, name), rtol=1e-9, atol=1e-9)
    assert right.merge(Moments.empty(CHANNELS)).count == VECTORS


def test_projecting_is_standardising_and_turning() -> None:
    vectors = drawn()
    pca = principal_components(streamed(vectors, 5), 6)
    components = pca.components.double().numpy()
    np.testing.assert_allclose(components @ components.T, np.eye(6), atol=1e-6)
    wanted = ((vectors - vectors.mean(0)) / vectors.std(0)) @ components.T
    tokens = torch.from_numpy(vectors).float().unflatten(0, (7, 100))
    np.testing.assert_allclose(pca.project(tokens).flatten(0, 1), wanted, atol=2e-4)
    np.testing.assert_allclose(wanted.var(0), pca.explained_variance, rtol=1e-4)
    largest = np.abs(components).argmax(1)
    assert (components[np.arange(6), largest] > 0).all()


def test_restoring_all_components_gives_the_tokens_back_and_fewer_the_nearest() -> None:
    vectors = torch.from_numpy(drawn()).float()
    whole = principal_components(Moments.of(vectors), CHANNELS)
    assert whole.explained == pytest.approx(1.0)
    scaled = (whole.restore(whole.project(vectors)) - vectors) / whole.std
    assert scaled.abs().max() < 1e-4
    some = principal_components(Moments.of(vectors), 8)
    lost = ((some.restore(some.project(vectors)) - vectors) / some.std).square().sum(1).mean()
    assert lost == pytest.approx(CHANNELS * (1 - some.explained), rel=1e-3)
    torch.testing.assert_close(
        some.project(some.restore(some.project(vectors))), some.project(vectors), atol=1e-3, rtol=0
    )


def test_refusals() -> None:
    vectors = torch.from_numpy(drawn())
    moments = Moments.of(vectors)
    with pytest.raises(DeltacacheError, match="25 components of 24 channels: give 1 to 24"):
        principal_components(moments, 25)
    with pytest.raises(DeltacacheError, match="0 components of 24 channels"):
        principal_components(moments, 0)
    with pytest.raises(DeltacacheError, match="8 vectors are too few for 8 components"):
        principal_components(Moments.of(vectors[:8]), 8)
    assert principal_components(Moments.of(vectors[:9]), 8).size == 8
    still = vectors.clone()
    still[:, [3, 20]] = 0.1
    message = r"2 of 24 channels have one value in all 700 vectors \(3, 20\): every channel must vary"
    with pytest.raises(DeltacacheError, match=message):
        principal_components(streamed(still.numpy(), 9), 8)
    for odd in (np.nan, np.inf, -np.inf):
        wrong = vectors.clone()
        wrong[5, 7] = odd
        with pytest.raises(DeltacacheError, match="channel 7 holds numbers that are not finite"):
            Moments.of(wrong)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    backbone = {"weights_sha256": "5e" * 32, "layers": [0, 2]}
    pca = principal_components(streamed(drawn(), 3), 5, {"backbone": backbone, "vectors": VECTORS})
    save_pca(tmp_path / "pca", pca)
    return tmp_path / "pca"


def test_a_saved_pca_comes_back(saved: Path) -> None:
    pca = load_pca(saved)
    tokens = torch.from_numpy(drawn(30, seed=4)).float()
    again = principal_components(streamed(drawn(), 3), 5)
    assert pca.fingerprint == again.fingerprint
    assert torch.equal(pca.project(tokens), again.project(tokens))
    assert (pca.size, pca.channels, pca.metadata["vectors"]) == (5, CHANNELS, VECTORS)
    config = json.loads((saved / "config.json").read_text())
    assert (config["components"], config["channels"], config["kind"]) == (5, CHANNELS, "pca")


def _rewrite(folder: Path, **tensors: torch.Tensor | None) -> None:
    held = {**load_file(folder / "pca.safetensors"), **tensors}
    save_file({name: part for name, part in held.items() if part is not None}, folder / "pca.safetensors")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda at: (at / "config.json").unlink(), "is not a PCA, it has no config.json"),
        (lambda at: (at / "pca.safetensors").unlink(), "is not a PCA, it has no pca.safetensors"),
        (lambda at: (at / "pca.safetensors").write_bytes(b"short"), "is damaged"),
        (lambda at: (at / "config.json").write_text('{"kind": "tokenizer"}'), "does not describe a PCA"),
        (lambda at: (at / "config.json").write_text("[]"), "does not describe a PCA"),
        (lambda at: _rewrite(at, std=None), "does not hold the tensors of a PCA"),
        (lambda at: _rewrite(at, more=torch.zeros(2)), "does not hold the tensors of a PCA"),
        (lambda at: _rewrite(at, mean=torch.zeros(CHANNELS + 1)), "does not hold the tensors of a PCA"),
        (
            lambda at: _rewrite(at, mean=torch.zeros(CHANNELS, dtype=torch.float64)),
            "does not hold the tensors",
        ),
        (
            lambda at: _rewrite(at, mean=torch.full((CHANNELS,), torch.nan)),
            "does not hold the tensors of a PCA",
        ),
        (lambda at: _rewrite(at, mean=torch.zeros(CHANNELS)), "it was damaged or exchanged"),
    ],
)
def test_damaged_files_are_refused(saved: Path, damage, message: str) -> None:
    damage(saved)
    with pytest.raises(CheckpointError, match=message):
        load_pca(saved)


def test_a_pca_of_other_tokens_is_refused(saved: Path) -> None:
    pca, sha = load_pca(saved), "5e" * 32
    check_pca(pca, saved, CHANNELS, sha, (0, 2))
    with pytest.raises(
        MismatchError, match="fitted on features of backbone 5e5e5e5e5e5e5e5e, but this one is 0000"
    ):
        check_pca(pca, saved, CHANNELS, "0" * 64, (0, 2))
    with pytest.raises(
        MismatchError, match="fitted on layers 0,2, 24 wide, but these tokens are layers 0,1, 24 wide"
    ):
        check_pca(pca, saved, CHANNELS, sha, (0, 1))
    with pytest.raises(MismatchError, match="these tokens are the last hidden state, 24 wide"):
        check_pca(pca, saved, CHANNELS, sha, None)
    with pytest.raises(MismatchError, match="these tokens are layers 0,2, 12 wide"):
        check_pca(pca, saved, 12, sha, (0, 2))


def test_metadata_must_not_hide_what_describes_the_pca(tmp_path: Path) -> None:
    one = torch.ones(2)
    with pytest.raises(ValueError, match="must not name \\['kind'\\]"):
        save_pca(tmp_path, Pca(one, one, torch.eye(2), one, {"kind": "head"}))
