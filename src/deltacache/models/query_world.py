"""World models that ask the past by queries: what DeltaWorld and DINO-world have in common (method section 1)."""

# B batch, T frames, P = T - 1 predicted frames, D hidden, K candidates, S samples, C context, H horizon
# M tokens of a frame: one delta token, several, or all patches; Z noise

from abc import abstractmethod
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from deltacache.models.blocks import (
    Memory,
    Predictor,
    Rotation,
    append,
    check_heads,
    first_tokens,
    frame_positions,
    initialise,
    repeat_batch,
    smooth_l1,
)
from deltacache.models.devices import in_precision
from deltacache.models.objectives import FlowHead, energy_score
from deltacache.models.selection import Selection, select_winners, select_winning_frames
from deltacache.models.world_model import IN_FULL, Grid, WorldLoss, WorldModel
from deltacache.schemas.configs import Objective


class Places(NamedTuple):
    """Which token of a frame: vectors (M, D) added to past tokens, and (M, Z) to queries."""

    of_tokens: Tensor
    of_queries: Tensor


class QueryWorld(WorldModel):
    """A query for each token of the next frame attends to the tokens of the frames before it.

    ``query`` noise gives many futures: one vector a frame, shared by all of its tokens; learned gives a single one.
    ``width`` is that of the blocks, where it is not the tokens'. ``objective`` says what futures are trained for:
    ``best_of_many`` (method section 1), ``energy``, or ``flow``, whose queries are learned and whose noise is carried
    to the tokens by a further head.
    """

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
        objective: Objective = "best_of_many",
        flow_layers: int = 3,
        flow_steps: int = 8,
    ) -> None:
        super().__init__()
        self.noise_size = width or hidden_size
        check_heads(self.noise_size, num_heads, multiple=2, least=6)
        if objective != "best_of_many" and query != "noise":
            raise ValueError(
                f"objective {objective} samples futures, and query {query!r} has one: give noise"
            )
        self.arguments: dict[str, Any] = {
            "hidden_size": hidden_size,
            "num_heads": num_heads,
            "num_layers": num_layers,
            "mlp_ratio": mlp_ratio,
            "query": query,
            "noise_std": noise_std,
            "layer_scale_init": layer_scale_init,
            "width": width,
        }
        self.objective: Objective = objective
        if objective != "best_of_many":  # so that older code opens what it can compute
            self.arguments["objective"] = objective
        if objective == "flow":
            self.arguments |= {"flow_layers": flow_layers, "flow_steps": flow_steps}
        self.hidden_size, self.noise_std, self.flow_steps = hidden_size, noise_std, flow_steps
        self.mlp_width = int(mlp_ratio * self.noise_size)
        self.predictor = Predictor(
            hidden_size, self.noise_size, num_heads, num_layers, mlp_ratio, layer_scale_init
        )
        learned = query == "learned" or objective == "flow"
        self.q_embed = nn.Embedding(1, self.noise_size) if learned else None
        initialise(self)
        self.flow = None
        if objective == "flow":
            self.flow = FlowHead(
                hidden_size, self.noise_size, num_heads, flow_layers, several=self.several_tokens
            )

    @abstractmethod
    def rotation(self, seconds: Tensor, grid: Grid | None) -> Rotation:
        """Positions (B, 1, F M, R) of all tokens of F frames at times (B, F)."""

    @abstractmethod
    def tokens_of_a_frame(self, grid: Grid | None) -> int:
        """M."""

    @property
    def several_tokens(self) -> bool:
        """Whether a frame may be more than one token."""
        return True

    @property
    def places(self) -> Places | None:
        """Where positions do not tell the tokens of a frame apart."""
        return None

    def noise_width(self, grid: Grid | None = None, *, training: bool = False) -> int:
        """Z; a flow's noise is as many numbers as a frame has, and one more in training, for the time on its path."""
        if self.flow is None:
            return self.noise_size
        return self.tokens_of_a_frame(grid) * self.hidden_size + training

    def training_loss(
        self,
        tokens: Tensor,
        timestamps_s: Tensor,
        *,
        grid: Grid | None = None,
        candidates: int,
        beta: float,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        selection: Selection = IN_FULL,
        rollout_steps: int = 1,
        context_noise: Tensor | None = None,
    ) -> WorldLoss:
        """What ``objective`` says, of ``candidates`` samples of each frame, which sees the frames before it.

        - best_of_many: smooth-L1 of the best one. Only the winners run with gradients; ``selection`` says how they are
          found. A learned query has one candidate and needs no noise.
        - energy: the energy score of all of them over the numbers of a frame, all with gradients.
        - flow: the squared error of the velocity at as many times on the way from noise to the frame.

        Args:
            rollout_steps: H; the last H frames are predicted one after the other, each from the prediction of those
                before it that is nearest to the truth, with gradients through all of them. 1: none is.
            context_noise: (B, T-1, ...) added to the frames that are seen, and not to those that are predicted.
        """
        if rollout_steps > 1:
            options = {"grid": grid, "candidates": candidates, "beta": beta, "selection": selection}
            return self._rollout_loss(
                tokens, timestamps_s, noise, generator, rollout_steps, context_noise, options
            )
        frames, seconds = self._frames(tokens, grid), _since_start(timestamps_s)
        targets = frames[:, 1:]
        seen = frames[:, :-1] if context_noise is None else frames[:, :-1] + context_noise.view_as(targets)
        past = self.remember(seen, seconds[:, :-1], grid)
        rotation = self.rotation(seconds[:, 1:], grid)
        if self.stochastic:
            shape = (*targets.shape[:2], candidates, self.noise_width(grid, training=True))
            noise = self._candidates(shape, noise, generator)
            if self.objective == "energy":
                loss, prediction, winners = self._energy(noise, rotation, past, targets)
                return WorldLoss(loss, prediction.view(tokens[:, 1:].shape), winners)
            if self.flow is not None:
                loss, prediction, winners = self._flow_matching(self.flow, noise, rotation, past, targets)
                return WorldLoss(loss, prediction.view(tokens[:, 1:].shape), winners)
            winners = self._winners(noise, rotation, past, targets, beta, selection)
            queries = noise.gather(2, winners[:, :, None, None].expand(-1, -1, 1, self.noise_size))[:, :, 0]
        else:
            if candidates != 1:
                raise ValueError(f"a learned query has one candidate, not {candidates}")
            winners = torch.zeros(targets.shape[:2], dtype=torch.long, device=targets.device)
            queries = self._learned_query.expand(*targets.shape[:2], -1)
        prediction = self._predict_frames(queries, rotation, past, targets.shape[2])
        loss = smooth_l1(prediction, targets, beta).mean()
        return WorldLoss(loss, prediction.view(tokens[:, 1:].shape), winners)

    @in_precision
    @torch.no_grad()
    def rollout(
        self,
        context_tokens: Tensor,
        timestamps_s: Tensor,
        noise: Tensor | None = None,
        *,
        grid: Grid | None = None,
    ) -> Tensor:
        """Each predicted frame joins the context of the next."""
        context = self._frames(context_tokens, grid)
        batch, seen, count, _ = context.shape
        horizon = timestamps_s.shape[1] - seen
        queries = self._rollout_queries(noise, batch, horizon, grid)  # (B, S, H, W)
        samples = queries.shape[1]
        seconds = _since_start(timestamps_s)
        past = repeat_batch(self.remember(context, seconds[:, :seen], grid), samples)
        seconds = seconds[:, seen:].repeat_interleave(samples, 0)
        predicted: list[Tensor] = []
        for step, query in enumerate(queries.flatten(0, 1).unbind(dim=1)):
            now = seconds[:, step : step + 1]
            frame = self.predictor(self._spread(query, count), self.rotation(now, grid), past)  # (B S, M, D)
            if self.flow is not None and noise is not None:
                begun = noise[:, :, step].reshape(frame.shape)
                frame = self.flow.transport(begun, frame, self.flow_steps)
            predicted.append(frame)
            if step + 1 < horizon:
                past = append(past, self.remember(frame[:, None], now, grid))
        futures = torch.stack(predicted, dim=1).unflatten(0, (batch, samples))
        return futures.view(batch, samples, horizon, *context_tokens.shape[2:])

    def remember(self, frames: Tensor, seconds: Tensor, grid: Grid | None = None) -> Memory:
        """Every block's keys and values of past frames (B, F, M, D) at times (B, F)."""
        tokens = frames if self.places is None else frames + self.places.of_tokens
        return self.predictor.remember(tokens.flatten(1, 2), self.rotation(seconds, grid))

    def _frames(self, tokens: Tensor, grid: Grid | None) -> Tensor:
        """(B, F, M, D) of tokens in either form."""
        frames = tokens[:, :, None] if tokens.dim() == 3 else tokens
        if frames.dim() != 4 or frames.shape[2] != self.tokens_of_a_frame(grid):
            raise ValueError(
                f"tokens are {tuple(tokens.shape)}, but a frame of this {type(self).__name__} is "
                f"{self.tokens_of_a_frame(grid)} tokens"
            )
        return frames

    def _spread(self, queries: Tensor, count: int) -> Tensor:
        """(..., M, Z) queries of the tokens of frames whose own are (..., Z)."""
        spread = queries[..., None, :].expand(*queries.shape[:-1], count, -1)
        return spread if self.places is None else spread + self.places.of_queries

    def _winners(
        self,
        noise: Tensor,
        rotation: Rotation,
        past: Memory,
        targets: Tensor,
        beta: float,
        selection: Selection,
    ) -> Tensor:
        """Index (B, P) of the candidate whose whole frame has the least loss."""
        if targets.shape[2] == 1 and self.places is None:
            return select_winners(self.predictor, noise, rotation, past, targets[:, :, 0], beta, selection)
        return select_winning_frames(
            self.predictor, noise, self._spread, rotation, past, targets, beta, selection
        )

    def _predict_frames(self, queries: Tensor, rotation: Rotation, past: Memory, count: int) -> Tensor:
        """Frames (B, P, M, D) for queries (B, P, Z), each from the frames before it."""
        spread = self._spread(queries, count)
        if count == 1:
            return self.predictor(spread[:, :, 0], rotation, past, _causal(queries))[:, :, None]
        # Frame by frame needs no mask: half the products, and kernels that never hold the scores.
        frames = [
            self.predictor(spread[:, step], frame_positions(rotation, step, count), first_tokens(past, seen))
            for step, seen in enumerate(range(count, (spread.shape[1] + 1) * count, count))
        ]
        return torch.stack(frames, dim=1)

    def _energy(
        self, noise: Tensor, rotation: Rotation, past: Memory, targets: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The score of frames from all candidates (B, P, K, Z), the nearest to the truth, and which these are."""
        steps, samples, count = targets.shape[1], noise.shape[2], targets.shape[2]
        if count == 1:
            queries = self._spread(noise, 1).flatten(1, 3)
            times = rotation.map(lambda part: part.repeat_interleave(samples, 2))
            visible = _causal(noise).repeat_interleave(samples, 0)
            frames = self.predictor(queries, times, past, visible).unflatten(1, (steps, samples, 1))
        else:
            by_frame: list[Tensor] = []
            for step in range(steps):
                now = frame_positions(rotation, step, count)
                times = now.map(lambda part: part.repeat(1, 1, samples, 1))
                queries = self._spread(noise[:, step], count).flatten(1, 2)
                seen = first_tokens(past, (step + 1) * count)
                by_frame.append(self.predictor(queries, times, seen).unflatten(1, (samples, count)))
            frames = torch.stack(by_frame, dim=1)
        scores = energy_score(frames.flatten(3), targets.flatten(2))
        with torch.no_grad():
            winners = (frames - targets[:, :, None]).float().square().mean((3, 4)).argmin(2)
        chosen = winners[:, :, None, None, None].expand(-1, -1, 1, *frames.shape[3:])
        return scores.mean(), frames.gather(2, chosen)[:, :, 0], winners

    def _rollout_loss(
        self,
        tokens: Tensor,
        timestamps_s: Tensor,
        noise: Tensor | None,
        generator: torch.Generator | None,
        steps: int,
        context_noise: Tensor | None,
        options: dict[str, Any],
    ) -> WorldLoss:
        """``training_loss`` of a clip whose last ``steps`` frames follow from one another."""
        grid, beta, candidates = options["grid"], options["beta"], options["candidates"]
        frames, seconds = self._frames(tokens, grid), _since_start(timestamps_s)
        predicted, count = frames.shape[1] - 1, frames.shape[2]
        if steps > predicted:
            raise ValueError(f"{steps} rollout steps do not fit in {predicted} predicted frames")
        if self.stochastic:
            shape = (len(frames), predicted, candidates, self.noise_width(grid, training=True))
            noise = self._candidates(shape, noise, generator)
        first = (
            predicted - steps + 1
        )  # these are predicted from true frames, the last of them begins the rollout
        part = None if noise is None else noise[:, :first]
        given = None if context_noise is None else context_noise[:, :first]
        begun = self.training_loss(
            tokens[:, : first + 1], timestamps_s[:, : first + 1], noise=part, context_noise=given, **options
        )
        seen = frames[:, :first] if given is None else frames[:, :first] + given.view_as(frames[:, :first])
        past = self.remember(seen, seconds[:, :first], grid)
        losses, winners = [begun.loss * first], [begun.winners]
        predictions = [begun.prediction.view(len(frames), first, count, -1)]
        for at in range(first, predicted):  # of frame at + 1
            past = append(past, self.remember(predictions[-1][:, -1:], seconds[:, at : at + 1], grid))
            now, target = self.rotation(seconds[:, at + 1 : at + 2], grid), frames[:, at + 1 : at + 2]
            loss, prediction, winner = self._last_frame(
                None if noise is None else noise[:, at], now, past, target, beta
            )
            losses.append(loss)
            winners.append(winner)
            predictions.append(prediction)
        prediction = torch.cat(predictions, dim=1).view(tokens[:, 1:].shape)
        return WorldLoss(torch.stack(losses).sum() / predicted, prediction, torch.cat(winners, dim=1))

    def _last_frame(
        self, noise: Tensor | None, now: Rotation, past: Memory, target: Tensor, beta: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, prediction (B, 1, M, D) and winner (B, 1) of a frame (B, 1, M, D) that sees all of the past."""
        batch, _, count, _ = target.shape

        def predict(queries: Tensor) -> Tensor:
            """(B, k, M, D) of queries (B, k, W)."""
            times = now.map(lambda part: part.repeat(1, 1, queries.shape[1], 1))
            return self.predictor(self._spread(queries, count).flatten(1, 2), times, past).unflatten(
                1, (queries.shape[1], count)
            )

        zeros = torch.zeros(batch, 1, dtype=torch.long, device=target.device)
        if noise is None or self.flow is not None:
            prediction = predict(self._learned_query.expand(batch, 1, -1))
            if self.flow is None or noise is None:
                return smooth_l1(prediction, target, beta).mean(), prediction, zeros
            begun = noise[..., :-1].unflatten(-1, target.shape[2:])
            times = torch.special.ndtr(noise[..., -1] / self.noise_std)
            loss, reached = self.flow.loss(target, prediction, begun, times)
            return loss, reached[:, :1], zeros
        if self.objective == "energy":
            frames = predict(noise)
            winner = (frames.detach() - target).float().square().mean((2, 3)).argmin(1, keepdim=True)
            chosen = frames.gather(1, winner[..., None, None].expand(-1, -1, *frames.shape[2:]))
            return energy_score(frames.flatten(2), target[:, 0].flatten(1)).mean(), chosen, winner
        with torch.no_grad():
            winner = smooth_l1(predict(noise), target, beta).mean((2, 3)).argmin(1, keepdim=True)
        prediction = predict(noise.gather(1, winner[..., None].expand(-1, -1, noise.shape[-1])))
        return smooth_l1(prediction, target, beta).mean(), prediction, winner

    def _flow_matching(
        self, flow: FlowHead, noise: Tensor, rotation: Rotation, past: Memory, targets: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The loss at every draw (B, P, K, Z), where the first leads, and which that is."""
        queries = self._learned_query.expand(*targets.shape[:2], -1)
        state = self._predict_frames(queries, rotation, past, targets.shape[2])[:, :, None]  # (B, P, 1, M, D)
        begun = noise[..., :-1].unflatten(-1, targets.shape[2:])
        times = torch.special.ndtr(noise[..., -1] / self.noise_std)  # of a normal number: uniform
        loss, reached = flow.loss(targets[:, :, None], state, begun, times)
        return loss, reached[:, :, 0], torch.zeros_like(times[:, :, 0], dtype=torch.long)

    @property
    def _learned_query(self) -> Tensor:
        assert self.q_embed is not None
        return self.q_embed.weight

    def _candidates(
        self, shape: tuple[int, ...], noise: Tensor | None, generator: torch.Generator | None
    ) -> Tensor:
        """The given noise (B, P, K, Z), or fresh one of that ``shape``."""
        if noise is None:
            if generator is None:
                raise ValueError("a noise query needs noise, or a generator to draw it from")
            return self.draw_noise(shape, generator)
        if noise.shape != shape:
            raise ValueError(f"noise is {tuple(noise.shape)}, expected {shape}: (B, T-1, K, Z)")
        return noise

    def _rollout_queries(self, noise: Tensor | None, batch: int, horizon: int, grid: Grid | None) -> Tensor:
        if not self.stochastic:
            if noise is not None:
                raise ValueError("a learned query takes no noise")
            return self._learned_query.expand(batch, 1, horizon, -1)
        if noise is None:
            raise ValueError("a noise query needs noise (B, S, H, Z): take it from draw_noise")
        if noise.shape[0] != batch or noise.shape[2] != horizon:
            raise ValueError(f"noise is {tuple(noise.shape)}, expected ({batch}, S, {horizon}, Z)")
        if self.flow is None:
            return noise
        if noise.shape[3] != self.noise_width(grid):
            raise ValueError(
                f"noise of a flow has {self.noise_width(grid)} numbers, as many as a frame (noise_width), not "
                f"{noise.shape[3]}"
            )
        return self._learned_query.expand(*noise.shape[:3], -1)


def _since_start(timestamps_s: Tensor) -> Tensor:
    """Seconds since the first frame: RoPE is relative, and small angles keep their float32 digits."""
    return timestamps_s - timestamps_s[:, :1]


def _causal(frames: Tensor) -> Tensor:
    """Mask (P, P): the query of target p sees the tokens of frames 0..p, which come before it."""
    steps = frames.shape[1]
    return torch.ones(steps, steps, dtype=torch.bool, device=frames.device).tril()
