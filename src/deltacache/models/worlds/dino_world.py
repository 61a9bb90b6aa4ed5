"""DINO-world: predicts all patch tokens of the next frame (the baseline of the paper's Tables 1, 2 and C)."""

from typing import ClassVar

from torch import Tensor

from deltacache.models.blocks import Rotation, space_time_rotation
from deltacache.models.query_world import QueryWorld
from deltacache.models.world_model import Grid, Kind


class DinoWorld(QueryWorld):
    """DeltaWorld's predictor with a query a patch and 3-D RoPE over seconds, width and height (method section 1).

    ``query`` learned is DINO-world; noise, shared over all patches of a frame, its best-of-many variant (Table 2).
    """

    trains_on: ClassVar[Kind] = "features"

    @property
    def label(self) -> str:
        if self.objective != "best_of_many":
            return f"dino_world_{self.objective}"
        return "dino_world_best_of_many" if self.stochastic else "dino_world"

    def tokens_of_a_frame(self, grid: Grid | None) -> int:
        """N, the patches of the grid."""
        rows, columns = _given(grid)
        return rows * columns

    def rotation(self, seconds: Tensor, grid: Grid | None) -> Rotation:
        return space_time_rotation(seconds, _given(grid), self.predictor.head_dim)


def _given(grid: Grid | None) -> Grid:
    if grid is None:
        raise ValueError("patch tokens need the grid of patches they lie on: (rows, columns)")
    return grid
