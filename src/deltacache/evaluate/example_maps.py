"""From tensors to what is kept of an example: tokens, and what a head or a decoder of pictures makes of them.

Shapes: T frames, H longest horizon, s samples, N patches, D hidden, h x w pixels of a map.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from deltacache.evaluate.examples import ExampleMaps, MapKind


@dataclass(frozen=True, slots=True)
class MapMaker:
    """One way of looking at features.

    Attributes:
        label: (H', W') of the last frame, at its own resolution, or ``None``.
        make: from tokens (B, N, D) to maps (B, h, w[, 3]).
    """

    kind: MapKind
    label: np.ndarray | None
    make: Callable[[Tensor], Tensor]

    def maps(self, tokens: Tensor) -> np.ndarray:
        """Maps (..., h, w[, 3]) of tokens (..., N, D)."""
        return self.make(tokens.flatten(0, -3)).unflatten(0, tokens.shape[:-2]).cpu().numpy()


def example_maps(
    makers: Iterator[MapMaker], clip: Tensor, reconstruction: Tensor, samples: Mapping[str, Tensor]
) -> Iterator[ExampleMaps]:
    """Maps of true frames (T, N, D), of reconstructed ones (H or 0, N, D) and of each world's (s, H, N, D)."""
    for maker in makers:
        truth = maker.maps(clip)
        yield ExampleMaps(
            kind=maker.kind,
            truth=truth,
            label=maker.label,
            reconstruction=maker.maps(reconstruction) if len(reconstruction) else truth[:0],
            samples={name: maker.maps(each) for name, each in samples.items()},
        )


def stored(tokens: Tensor) -> np.ndarray:
    """As an example holds them."""
    return tokens.half().cpu().numpy()
