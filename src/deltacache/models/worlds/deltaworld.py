"""DeltaWorld: predicts the next delta token from past ones; a noise query makes each future another."""

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from deltacache.models.blocks import Rotation, initialise, time_rotation
from deltacache.models.query_world import Places, QueryWorld
from deltacache.models.world_model import Grid, Kind
from deltacache.schemas.configs import Objective


class DeltaWorld(QueryWorld):
    """The world model (method section 1): ``query`` noise for many futures, learned for a single one (Table C).

    With ``tokens_per_frame`` M > 1 a learned vector a place tells the delta tokens of a frame apart. They share
    the noise, and are predicted side by side, none from another.
    """

    trains_on: ClassVar[Kind] = "deltas"

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_layers: int,
        *,
        mlp_ratio: float = 4.0,
        query: Literal["noise", "learned"] = "noise",
        noise_std: float = 0.02,
        layer_scale_init: float = 1e-5,
        width: int | None = None,
        tokens_per_frame: int = 1,
        objective: Objective = "best_of_many",
        flow_layers: int = 3,
        flow_steps: int = 8,
    ) -> None:
        self.tokens_per_frame = tokens_per_frame  # first: the head of a flow asks for it
        super().__init__(
            hidden_size,
            num_heads,
            num_layers,
            mlp_ratio=mlp_ratio,
            query=query,
            noise_std=noise_std,
            layer_scale_init=layer_scale_init,
            width=width,
            objective=objective,
            flow_layers=flow_layers,
            flow_steps=flow_steps,
        )
        self.arguments["tokens_per_frame"] = tokens_per_frame
        several = tokens_per_frame > 1
        self.place_embed = nn.Embedding(tokens_per_frame, hidden_size) if several else None
        self.q_place_embed = nn.Embedding(tokens_per_frame, self.noise_size) if several else None
        for embedding in filter(None, (self.place_embed, self.q_place_embed)):
            initialise(embedding)

    @property
    def label(self) -> str:
        if self.objective != "best_of_many":
            return f"deltaworld_{self.objective}"
        return "deltaworld" if self.stochastic else "deltaworld_discriminative"

    @property
    def several_tokens(self) -> bool:
        return self.tokens_per_frame > 1

    @property
    def places(self) -> Places | None:
        if self.place_embed is None or self.q_place_embed is None:
            return None
        return Places(self.place_embed.weight, self.q_place_embed.weight)

    def tokens_of_a_frame(self, grid: Grid | None) -> int:
        del grid
        return self.tokens_per_frame

    def rotation(self, seconds: Tensor, grid: Grid | None) -> Rotation:
        """All tokens of a frame have its time."""
        del grid
        return time_rotation(
            torch.repeat_interleave(seconds, self.tokens_per_frame, 1), self.predictor.head_dim
        )
