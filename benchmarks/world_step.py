"""The world model's step: online, from the cache, and the floor that matrix products set, in one run.

    python benchmarks/world_step.py                          two CPU cores: under 4 minutes
    python benchmarks/world_step.py --batch 1024 --steps 5   a GPU: bf16 rate, memory, GPU-hours of the recipe

(a) the online step: frames through a ViT-B and the tokenizer's encoder as ``tokenize`` does it, and (b). Encoding is
    measured on as many clips as it takes at once and counted for every clip of the batch.
(b) the cached step, as the trainer does it: noise, best-of-many loss, backward, gradient norm, guard, fused AdamW, on a
    batch that stays the same (reading is measured by data_speed.py).
(c) the floor: the products of (b), counted while it runs with their precision, at the rate of bare products of the
    step's shapes, measured between (a) and (b). Beside it the floor of the plain definition, which pushes every
    candidate through the query and output projections too.

On a CPU the seconds are those that the process computed on all its threads, for others may be busy on the same cores;
the wall clock stands beside them. Weights are random, LayerScale is 0.3 so that all blocks matter for who wins.
The comparison of selections takes float32 as the truth; regret is the loss given away, in standard deviations of the
candidates' losses.
"""

import argparse
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from deltacache.models.blocks import time_rotation
from deltacache.models.deltatok import DeltaTok
from deltacache.models.devices import choose_device, forward_precision
from deltacache.models.optimizer_groups import decay_groups
from deltacache.models.selection import FoldedPredictor, selection_for
from deltacache.models.worlds.deltaworld import DeltaWorld
from deltacache.pipeline.work.encoders import DeltaEncoder, default_batch_clips, resolve_precision
from deltacache.schemas.configs import tokenizer_preset
from deltacache.schemas.datasets import Precision, TrainingPrecision
from deltacache.train.optimizer import FiniteGuard, clip_gradients
from deltacache.train.order import MicroBatch, normal_draws
from encoder import backbone_named, clips_of

HIDDEN, HEADS, LAYERS, FRAMES, PIXELS, BETA = 768, 12, 12, 8, 512, 0.1
RECIPE_CLIPS = 305_000 * 1024
Flop = Mapping[torch.dtype, int]


_ATEN = torch.ops.aten
_COUNTED_AS = {
    _ATEN.baddbmm_: _ATEN.baddbmm,
    _ATEN.addmm_: _ATEN.addmm,
    _ATEN._scaled_dot_product_flash_attention_for_cpu: _ATEN._scaled_dot_product_flash_attention,
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: (
        _ATEN._scaled_dot_product_flash_attention_backward
    ),
}
"""Operations that PyTorch's table of FLOP does not have, and those that multiply as much."""


class Products(TorchDispatchMode):
    """Counts the FLOP of all matrix products by the precision that they run in."""

    def __init__(self) -> None:
        super().__init__()
        self.flop: dict[torch.dtype, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        packet = _COUNTED_AS.get(func._overloadpacket, func._overloadpacket)
        if packet in flop_registry:
            dtype = (out[0] if isinstance(out, tuple) else out).dtype
            flop = flop_registry[packet](*args, **(kwargs or {}), out_val=out)
            self.flop[dtype] = self.flop.get(dtype, 0) + flop
        return out


@dataclass(frozen=True)
class Seconds:
    """Of one measurement: those that are compared, and by the wall clock."""

    used: float
    wall: float


def measure(work: Callable[[], Any], device: torch.device, repeats: int) -> Seconds:
    """The median of ``repeats`` calls."""
    taken: list[Seconds] = []
    for _ in range(repeats):
        _finish(device)
        wall, used = time.perf_counter(), clock_of(device)()
        work()
        _finish(device)
        taken.append(Seconds(clock_of(device)() - used, time.perf_counter() - wall))
    return sorted(taken, key=lambda one: one.used)[repeats // 2]


def clock_of(device: torch.device) -> Callable[[], float]:
    """Seconds that pass, or on a CPU those that this process computed."""
    return time.perf_counter if device.type == "cuda" else time.process_time


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass
class CachedStep:
    """A step of the world model's trainer on a batch of clips that stays the same."""

    world: DeltaWorld
    optimizer: torch.optim.AdamW
    guard: FiniteGuard
    tokens: Tensor
    seconds: Tensor
    candidates: int

    @classmethod
    def of(cls, batch: int, candidates: int, device: torch.device) -> "CachedStep":
        """With random weights and tokens."""
        world = DeltaWorld(HIDDEN, HEADS, LAYERS, layer_scale_init=0.3).to(device).train()
        groups = [dict(group) for group in decay_groups(world, 0.4)]
        tokens = torch.randn(batch, FRAMES, HIDDEN, device=device)
        seconds = (0.04 + 0.3 * torch.rand(batch, FRAMES, device=device)).cumsum(1)
        optimizer = torch.optim.AdamW(groups, lr=1e-4, fused=True)
        return cls(world, optimizer, FiniteGuard(optimizer, device), tokens, seconds, candidates)

    def noise(self) -> Tensor:
        """Candidates, drawn as the trainer does it."""
        batch, frames, hidden = self.tokens.shape
        shape = (frames - 1, self.candidates, hidden)
        drawn = normal_draws("noise", 0, MicroBatch(0, 0, batch), batch, shape, self.tokens.device)
        return drawn.mul_(self.world.noise_std)

    def run(self) -> None:
        """Noise, loss, backward, norm, guard, update."""
        device = self.tokens.device
        with forward_precision(device):
            result = self.world.training_loss(
                self.tokens,
                self.seconds,
                candidates=self.candidates,
                beta=BETA,
                noise=self.noise(),
                selection=selection_for(device, HIDDEN),
            )
        self._update(result.loss)

    def run_plain(self) -> None:
        """The same by the plain definition."""
        noise, targets = self.noise(), self.tokens[:, 1:]
        _, steps, count, _ = noise.shape
        seconds = self.seconds - self.seconds[:, :1]
        rotation = time_rotation(seconds[:, 1:], HIDDEN // HEADS)
        times = rotation.map(lambda part: part.repeat_interleave(count, 2))
        visible = torch.ones(steps, steps, dtype=torch.bool, device=noise.device).tril()
        predictor = self.world.predictor
        with torch.autocast(noise.device.type, torch.bfloat16):
            past = self.world.remember(self.tokens[:, :-1, None], seconds[:, :-1])
            with torch.no_grad():
                tried = predictor(noise.flatten(1, 2), times, past, visible.repeat_interleave(count, 0))
                tried = tried.float().view_as(noise)
                expected = targets[:, :, None].expand_as(tried)
                losses = F.smooth_l1_loss(tried, expected, reduction="none", beta=BETA).mean(-1)
            winners = losses.argmin(-1)[..., None, None].expand(-1, -1, 1, HIDDEN)
            prediction = predictor(noise.gather(2, winners)[:, :, 0], rotation, past, visible)
            loss = F.smooth_l1_loss(prediction.float(), targets, beta=BETA)
        self._update(loss)

    def _update(self, loss: Tensor) -> None:
        self.optimizer.zero_grad()
        loss.backward()
        self.guard.look_at(loss.detach(), clip_gradients(list(self.world.parameters()), None))
        self.optimizer.step()

    @torch.no_grad()
    def losses(self, noise: Tensor, dtype: torch.dtype) -> Tensor:
        """Of all candidates of the first clips, as many as there is noise."""
        some = slice(0, len(noise))
        tokens, seconds = self.tokens[some], self.seconds[some] - self.seconds[some, :1]
        past = self.world.remember(tokens[:, :-1, None], seconds[:, :-1])
        rotation = time_rotation(seconds[:, 1:], HIDDEN // HEADS)
        folded = FoldedPredictor(self.world.predictor, dtype)
        return folded.losses(noise, rotation, past, tokens[:, 1:], BETA)


def tokenizer_step(pairs: int, precision: TrainingPrecision, device: torch.device) -> Callable[[], None]:
    """A step of the released tokenizer's trainer on pairs that stay the same."""
    tokenizer = DeltaTok(HIDDEN, **tokenizer_preset("released").model.model_dump()).to(device).train()
    optimizer = torch.optim.AdamW([dict(g) for g in decay_groups(tokenizer, 0.4)], lr=1e-4, fused=True)
    guard, side = FiniteGuard(optimizer, device), 16
    previous, current = torch.randn(2, pairs, side**2, HIDDEN, device=device)

    def run() -> None:
        with forward_precision(device, precision):
            loss = tokenizer.training_loss(
                previous, current, (side, side), "log_cosh", generator=torch.Generator().manual_seed(0)
            ).loss
        optimizer.zero_grad()
        loss.backward()
        guard.look_at(loss.detach(), clip_gradients(list(tokenizer.parameters()), None))
        optimizer.step()

    return run


def print_tokenizer(pairs: int, steps: int, rates: Mapping[torch.dtype, float], device: torch.device) -> None:
    """Row (e)."""
    precisions: tuple[TrainingPrecision, ...] = ("float32", "bfloat16")
    for precision in precisions:
        run = tokenizer_step(pairs, precision, device)
        with Products() as products:
            run()
        taken, floor = measure(run, device, steps), at_rates(products.flop, rates)
        print(
            f"(e) tokenizer, {precision}: {taken.used / pairs:.3f} ({taken.wall / pairs:.3f}) a pair, "
            f"{taken.used / floor:.2f} times the floor of its products {floor / pairs:.3f}"
        )


def plain_flop(batch: int, candidates: int) -> int:
    """Products of a step by the plain definition: every candidate through the predictor, then the winners."""
    with torch.device("meta"), Products() as winners:  # a learned query has nothing to select
        world = DeltaWorld(HIDDEN, HEADS, LAYERS, query="learned")
        tokens, seconds = torch.empty(batch, FRAMES, HIDDEN), torch.empty(batch, FRAMES)
        world.training_loss(tokens, seconds, candidates=1, beta=BETA).loss.backward()
    a_query = LAYERS * (2 * HIDDEN**2 + 2 * HIDDEN * world.mlp_width) + HIDDEN**2
    seen = sum(range(1, FRAMES))  # keys, over all frames that are predicted
    chosen = 2 * batch * candidates * ((FRAMES - 1) * a_query + 2 * LAYERS * HIDDEN * seen)
    return chosen + sum(winners.flop.values())


def product_rates(device: torch.device) -> dict[torch.dtype, float]:
    """FLOP/s of bare products, the best of the MLP's two shapes and a square."""
    rows, square = (2**17, 8192) if device.type == "cuda" else (1024, 2048)
    shapes = [(rows, HIDDEN, 4 * HIDDEN), (rows, 4 * HIDDEN, HIDDEN), (square, square, square)]
    rates: dict[torch.dtype, float] = {}
    for dtype in (torch.float32, torch.bfloat16):
        for m, k, n in shapes:
            left = torch.randn(m, k, device=device, dtype=dtype)
            weight = torch.randn(n, k, device=device, dtype=dtype)
            rounds = max(1, int(2e10 // (2 * m * k * n)))
            F.linear(left, weight)
            taken = measure(lambda: [F.linear(left, weight) for _ in range(rounds)], device, 3)  # noqa: B023
            rates[dtype] = max(rates.get(dtype, 0.0), rounds * 2 * m * k * n / taken.used)
    return rates


def at_rates(flop: Flop, rates: Mapping[torch.dtype, float]) -> float:
    """Seconds of these products."""
    return sum(count / rates[dtype] for dtype, count in flop.items())


def encoding(device: torch.device, precision: Precision | Literal["auto"]) -> Callable[[], Any]:
    """From frames in memory to delta tokens, and of how many clips at once."""
    backbone = backbone_named("vitb").to_precision(resolve_precision(device, precision))
    tokenizer = DeltaTok(HIDDEN, HEADS, LAYERS, 1)  # its decoder has no part in this
    count = default_batch_clips(device, FRAMES)
    grid = backbone.grid(PIXELS)
    black = np.zeros((grid[0] * grid[1], HIDDEN), np.float16)  # a constant of the resolution, whatever it is
    encoder = DeltaEncoder(tokenizer, black, grid, device, backbone, count)
    clips = clips_of(count, FRAMES, PIXELS)
    return lambda: encoder.encode(clips)


def compare_selections(step: CachedStep, clips: int) -> str:
    """How often bfloat16 alone and with a shortlist of four chooses the winner of float32, and the regret."""
    noise = step.noise()[:clips]
    truth = step.losses(noise, torch.float32)
    rough = step.losses(noise, torch.bfloat16)
    least, spread = truth.amin(-1), truth.std(-1)
    parts: list[str] = []
    for listed in (1, 4):
        few = rough.topk(listed, largest=False).indices
        found = truth.gather(-1, few).amin(-1)
        same, regret = (found == least).float().mean(), ((found - least) / spread).mean()
        parts.append(f"best of {listed} in bf16: {100 * same:.1f} % agree, regret {regret:.4f}")
    return f"selection, {truth.shape[0] * truth.shape[1]} targets of {truth.shape[2]}: " + "; ".join(parts)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--batch", type=int, default=16, help="clips of the cached step")
    parser.add_argument("--candidates", type=int, default=256)
    parser.add_argument("--steps", type=int, default=1, help="measured steps; one goes before them")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--online-precision", default="auto", choices=["auto", "float32", "bfloat16"])
    parser.add_argument("--compare-clips", type=int, default=4, help="whose winners are compared; 0 for none")
    parser.add_argument("--tokenizer", type=int, default=0, help="pairs of the tokenizer's step; 0 for none")
    asked = parser.parse_args()
    device = choose_device(asked.device)
    torch.manual_seed(0)
    encode = encoding(device, asked.online_precision)
    encoded = default_batch_clips(device, FRAMES)
    encode_s = measure(encode, device, 3 if device.type == "cuda" else 1)
    rates = product_rates(device)
    clips = asked.batch
    step = CachedStep.of(clips, asked.candidates, device)
    with Products() as products:
        step.run()
    step.run_plain()
    runs = [(measure(step.run, device, 1), measure(step.run_plain, device, 1)) for _ in range(asked.steps)]
    cached, plainly = (
        sorted(taken, key=lambda one: one.used)[len(runs) // 2] for taken in zip(*runs, strict=True)
    )
    again = product_rates(device)
    rates = {dtype: max(rate, again[dtype]) for dtype, rate in rates.items()}

    online = encode_s.used / encoded * clips + cached.used
    floor, plain = at_rates(products.flop, rates), plain_flop(clips, asked.candidates)
    goal = (1.7 if clips >= 16 else 2.0) if torch.cpu.get_capabilities().get("amx_bf16") else 1.3
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(
        f"{name}, torch {torch.__version__}, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}"
    )
    print(
        f"batch {clips}, K {asked.candidates}, {FRAMES} frames of {PIXELS} px, ViT-B; seconds a clip (wall)"
    )
    wall = encode_s.wall / encoded + cached.wall / clips
    print(f"(a) online step  {online / clips:8.3f} ({wall:.3f})")
    print(f"(b) cached step  {cached.used / clips:8.3f} ({cached.wall / clips:.3f})")
    print(
        f"(c) floor        {floor / clips:8.3f}  TFLOP a clip: "
        + ", ".join(f"{_short(d)} {n / clips / 1e12:.4f}" for d, n in products.flop.items())
    )
    print(
        f"    plain, fp32  {plain / clips / rates[torch.float32]:8.3f}  {plain / clips / 1e12:.3f} TFLOP a clip"
    )
    print(f"    plain, bf16  {plain / clips / rates[torch.bfloat16]:8.3f}")
    print(f"(d) plain step   {plainly.used / clips:8.3f} ({plainly.wall / clips:.3f})")
    print("products: " + ", ".join(f"{_short(d)} {rate / 1e9:,.0f} GFLOP/s" for d, rate in rates.items()))
    print(
        f"a / b = {online / cached.used:.1f} (goal 55)    b / c = {cached.used / floor:.2f} "
        f"(goal {goal})    d / b = {plainly.wall / cached.wall:.2f} in wall time (goal 1.8)"
    )
    if device.type == "cuda":
        whole = cached.used * rates[torch.bfloat16]
        print(
            f"{100 * sum(products.flop.values()) / whole:.0f} % of the bf16 rate for the products that are made "
            f"(goal 55), {100 * plain / whole:.0f} % for those of the plain definition"
        )
        print(f"peak memory {torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB")
        print(f"{cached.used / clips * RECIPE_CLIPS / 3600:.1f} GPU-hours for 305,000 steps of 1,024 clips")
    if asked.tokenizer:
        print_tokenizer(asked.tokenizer, max(3, asked.steps), rates, device)
    if asked.compare_clips:
        print(compare_selections(step, asked.compare_clips))


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


if __name__ == "__main__":
    main()
