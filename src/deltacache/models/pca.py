"""Principal components of patch tokens: found from streamed moments, applied on any device, kept without pickle.

Channels are standardised first, so the components are those of the correlation matrix (DINO-Foresight, Karypidis et
al. 2024, arXiv 2412.11673; method section 4, Table D). V vectors, D channels, K components.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from deltacache.models.weights import weights_fingerprint
from deltacache.schemas.errors import CheckpointError, DeltacacheError, MismatchError

CONFIG_FILE, WEIGHTS_FILE = "config.json", "pca.safetensors"
_NAMES_SHOWN = 8


@dataclass(slots=True)
class Moments:
    """Count, mean and scatter of vectors that arrive in batches, float64: D * D numbers however many there are.

    Batches are merged by their means (Chan, Golub and LeVeque 1979), which loses no digits to large means; the
    order of batches changes rounding only.

    Attributes:
        count: V.
        mean: (D,).
        scatter: (D, D), sum over vectors of the outer products of their deviations from the mean.
        low: (D,), the least value of each channel; likewise ``high``.
    """

    count: int
    mean: Tensor
    scatter: Tensor
    low: Tensor
    high: Tensor

    @classmethod
    def empty(cls, channels: int, device: torch.device | str = "cpu") -> Self:
        """Of no vectors yet."""
        zeros = torch.zeros(channels, dtype=torch.float64, device=device)
        infinite = torch.full_like(zeros, torch.inf)
        return cls(0, zeros, torch.outer(zeros, zeros), infinite, -infinite)

    @classmethod
    def of(cls, vectors: Tensor) -> Self:
        """Of (V, D) vectors, V at least 1, on their device.

        Raises:
            DeltacacheError: a number among them is not finite.
        """
        vectors = vectors.double()
        if not vectors.isfinite().all():
            channel = int((~vectors.isfinite()).any(0).nonzero()[0])
            raise DeltacacheError(f"channel {channel} holds numbers that are not finite")
        mean, low, high = vectors.mean(0), vectors.amin(0), vectors.amax(0)
        centred = vectors - mean
        return cls(len(vectors), mean, centred.T @ centred, low, high)

    def merge(self, other: "Moments") -> Self:
        """Take the vectors of ``other`` in."""
        count = self.count + other.count
        if not other.count:
            return self
        apart = other.mean - self.mean
        self.scatter += other.scatter
        self.scatter += torch.outer(apart, apart) * (self.count * other.count / count)
        self.mean += apart * (other.count / count)
        self.low, self.high = torch.minimum(self.low, other.low), torch.maximum(self.high, other.high)
        self.count = count
        return self

    @property
    def std(self) -> Tensor:
        """(D,) standard deviation of each channel, divided by V."""
        return (self.scatter.diagonal() / self.count).clamp_min(0.0).sqrt()


class Pca(nn.Module):
    """A linear map from D channels to K components and back; float32 buffers, no gradient.

    Attributes:
        mean, std: (D,) of the channels.
        components: (K, D) orthonormal rows, the one of largest variance first; of each, the entry of largest size is
            positive.
        explained_variance: (K,) variance of each component; all D channels together have D.
        metadata: what it was fitted on; see ``save_pca``.
    """

    mean: Tensor
    std: Tensor
    components: Tensor
    explained_variance: Tensor

    def __init__(
        self,
        mean: Tensor,
        std: Tensor,
        components: Tensor,
        explained_variance: Tensor,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.metadata = dict(metadata or {})
        for name, tensor in {
            "mean": mean,
            "std": std,
            "components": components,
            "explained_variance": explained_variance,
        }.items():
            self.register_buffer(name, tensor.detach().float().contiguous().clone())
        self.fingerprint = weights_fingerprint(self.state_dict())

    @property
    def channels(self) -> int:
        """D."""
        return self.components.shape[1]

    @property
    def size(self) -> int:
        """K."""
        return self.components.shape[0]

    @property
    def explained(self) -> float:
        """Share of the standardised channels' variance that the components keep."""
        return float(self.explained_variance.double().sum()) / self.channels

    def project(self, tokens: Tensor) -> Tensor:
        """(..., D) to (..., K) float32."""
        return ((tokens.float() - self.mean) / self.std) @ self.components.T

    def restore(self, reduced: Tensor) -> Tensor:
        """(..., K) to (..., D) float32: the nearest point that the components reach, in standardised channels."""
        return (reduced.float() @ self.components) * self.std + self.mean


def principal_components(moments: Moments, size: int, metadata: Mapping[str, Any] | None = None) -> Pca:
    """The ``size`` directions of largest variance of standardised channels, from an exact eigendecomposition.

    Raises:
        DeltacacheError: not more vectors than components, more components than channels, or a channel that never
            changes, which cannot be standardised.
    """
    channels = len(moments.mean)
    if not 1 <= size <= channels:
        raise DeltacacheError(f"{size} components of {channels} channels: give 1 to {channels}")
    if moments.count <= size:
        raise DeltacacheError(
            f"{moments.count} vectors are too few for {size} components: there must be more vectors than components. "
            "Take more frames, or fewer components"
        )
    constant = (moments.low == moments.high).nonzero().flatten().tolist()
    if constant:
        shown = ", ".join(map(str, constant[:_NAMES_SHOWN])) + (
            ", ..." if len(constant) > _NAMES_SHOWN else ""
        )
        raise DeltacacheError(
            f"{len(constant)} of {channels} channels have one value in all {moments.count} vectors ({shown}): every "
            "channel must vary, for it is divided by its standard deviation. Take frames that differ more, or another "
            "backbone"
        )
    std = moments.std
    correlation = moments.scatter / moments.count / torch.outer(std, std)
    variances, vectors = torch.linalg.eigh(correlation)
    components = vectors.flip(1)[:, :size].T
    largest = components.abs().argmax(1, keepdim=True)
    components = components * components.gather(1, largest).sign()
    explained = variances.flip(0)[:size].clamp_min(0.0)
    return Pca(moments.mean.cpu(), std.cpu(), components.cpu(), explained.cpu(), metadata)


def save_pca(folder: Path, pca: Pca) -> None:
    """Write ``pca.safetensors`` and ``config.json`` (fingerprint, sizes, ``pca.metadata``); plain writes."""
    config = {
        "kind": "pca",
        "fingerprint": pca.fingerprint,
        "components": pca.size,
        "channels": pca.channels,
        "explained": pca.explained,
    }
    if taken := config.keys() & pca.metadata.keys():
        raise ValueError(f"metadata must not name {sorted(taken)}: these describe the PCA")
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.cpu() for name, tensor in pca.state_dict().items()}, folder / WEIGHTS_FILE)
    (folder / CONFIG_FILE).write_text(json.dumps({**config, **pca.metadata}, indent=2) + "\n")


def load_pca(folder: Path) -> Pca:
    """Read what ``save_pca`` wrote.

    Raises:
        CheckpointError: missing, damaged, of another kind, misshapen, or exchanged.
    """
    way_out = "give the output of deltacache fit-pca"
    missing = [name for name in (CONFIG_FILE, WEIGHTS_FILE) if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(f"{folder} is not a PCA, it has no {missing[0]}: {way_out}")
    try:
        config = json.loads((folder / CONFIG_FILE).read_bytes())
        tensors = load_file(folder / WEIGHTS_FILE)
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"the PCA in {folder} is damaged ({error}): {way_out}") from error
    if not isinstance(config, dict) or config.get("kind") != "pca":
        raise CheckpointError(f"{folder / CONFIG_FILE} does not describe a PCA: {way_out}")
    shapes = _Shapes.of(tensors)
    if shapes is None or not all(
        part.dtype == torch.float32 and part.isfinite().all() for part in tensors.values()
    ):
        raise CheckpointError(f"{folder / WEIGHTS_FILE} does not hold the tensors of a PCA: {way_out}")
    described = {"kind", "fingerprint", "components", "channels", "explained"}
    pca = Pca(**tensors, metadata={name: value for name, value in config.items() if name not in described})
    if pca.fingerprint != config.get("fingerprint") or (pca.size, pca.channels) != shapes:
        raise CheckpointError(
            f"{folder / WEIGHTS_FILE} has the fingerprint {pca.fingerprint}, but {CONFIG_FILE} says "
            f"{config.get('fingerprint')}: it was damaged or exchanged; fit it again"
        )
    return pca


def check_pca(
    pca: Pca, path: Path, hidden_size: int, weights_sha256: str, layers: tuple[int, ...] | None
) -> None:
    """Refuse a PCA of other tokens.

    Args:
        hidden_size: D of the tokens that it is to reduce, made by the backbone with these weights from these layers.

    Raises:
        MismatchError: another backbone, other layers, or another width.
    """
    made_of = pca.metadata.get("backbone", {})
    fitted = made_of.get("layers")
    if made_of.get("weights_sha256", weights_sha256) != weights_sha256:
        raise MismatchError(
            f"the PCA {path} was fitted on features of backbone {made_of['weights_sha256'][:16]}, but this one is "
            f"{weights_sha256[:16]}: take that backbone, or fit a PCA on features of this one"
        )
    if (None if fitted is None else tuple(fitted)) != layers or pca.channels != hidden_size:
        raise MismatchError(
            f"the PCA {path} was fitted on {_layers(fitted)}, {pca.channels} wide, but these tokens are "
            f"{_layers(layers)}, {hidden_size} wide: give the same layers, or fit a PCA on these"
        )


def _layers(layers: Any) -> str:
    return "the last hidden state" if layers is None else f"layers {','.join(map(str, layers))}"


class _Shapes(NamedTuple):
    components: int
    channels: int

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Self | None:
        """Sizes of a PCA whose tensors fit together, else None."""
        names = {"mean", "std", "components", "explained_variance"}
        if tensors.keys() != names or tensors["components"].dim() != 2:
            return None
        components, channels = tensors["components"].shape
        wanted = {"mean": (channels,), "std": (channels,), "explained_variance": (components,)}
        fit = all(tuple(tensors[name].shape) == shape for name, shape in wanted.items())
        return cls(components, channels) if fit else None
