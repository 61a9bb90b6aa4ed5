"""Time and memory on this machine, with random weights and tokens."""

# B batch, T frames, K candidates, S samples, H horizon, Z noise

import time
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from deltacache.models.backbones.convention import InputConvention
from deltacache.models.costs.parts import rebuilt, tokens_shape
from deltacache.models.costs.systems import Setting, System, grid_of
from deltacache.models.devices import autocast_to
from deltacache.models.futures import decode_future
from deltacache.models.optimizer_groups import decay_groups
from deltacache.models.selection import selection_for
from deltacache.models.world_model import Grid, WorldModel

_MOST_RUNS, _ENOUGH_S = 20, 3.0
_SPACING_S = 0.2
_BETA = 0.1


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one run.

    Attributes:
        seconds: of the fastest one, so that others on the machine matter least.
        peak_bytes: the most that tensors took at once, weights and what an optimizer keeps included.
    """

    seconds: float
    peak_bytes: int


def training_step_cost(
    world: WorldModel, frames: int, grid: Grid, candidates: int, batch_size: int, device: torch.device
) -> Cost:
    """One step of a new model like ``world``: loss, backward and AdamW on ``batch_size`` random clips.

    As the trainer runs it: bfloat16 products on CUDA, the selection that is fastest on this device.
    """
    model = rebuilt(world, device).train()
    groups = [dict(group) for group in decay_groups(model, 0.1)]
    optimizer = torch.optim.AdamW(groups, lr=1e-4, fused=True)
    tokens = torch.randn(tokens_shape(model, batch_size, frames, grid), device=device)
    seconds = torch.arange(frames, device=device).expand(batch_size, -1) * _SPACING_S
    generator = torch.Generator().manual_seed(0)
    wanted = candidates if model.stochastic else 1

    def step() -> None:
        noise = None
        if model.stochastic:
            noise = torch.randn(batch_size, frames - 1, wanted, model.noise_size, device=device)
            noise.mul_(model.noise_std)
        with autocast_to(device.type, torch.bfloat16 if device.type == "cuda" else None):
            result = model.training_loss(
                tokens,
                seconds,
                grid=grid,
                candidates=wanted,
                beta=_BETA,
                noise=noise,
                generator=generator,
                selection=selection_for(device, model.hidden_size),
            )
        optimizer.zero_grad()
        result.loss.backward()
        optimizer.step()

    def held() -> Iterable[Tensor]:
        weights = list(model.parameters())
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        moments = [each for state in optimizer.state.values() for each in state.values()]
        return [*weights, *gradients, *model.buffers(), tokens, *filter(torch.is_tensor, moments)]

    return _measured(step, held, device)


def futures_cost(system: System, encoder: InputConvention, setting: Setting, device: torch.device) -> Cost:
    """All futures of one crop as patch tokens, from the pixels of its context, in float32.

    ``encoder`` is on ``device``; random tokens of the width that the models take stand for what it answers.
    """
    grid = grid_of(encoder, setting.image_size)
    world = rebuilt(system.world, device)
    tokenizer = None if system.tokenizer is None else rebuilt(system.tokenizer, device)
    pixels = torch.randn(setting.context, 3, *setting.image_size, device=device)
    seconds = torch.arange(setting.context + setting.horizon, device=device)[None] * _SPACING_S
    noise = None
    if world.stochastic:
        noise = torch.randn(1, setting.samples, setting.horizon, world.noise_size, device=device)
    width = world.hidden_size if tokenizer is None else tokenizer.hidden_size
    patches = torch.randn(1, setting.context, grid[0] * grid[1], width, device=device)

    @torch.no_grad()
    def roll_out() -> Tensor:
        encoder.hidden_states(pixels)
        if tokenizer is None:
            return world.rollout(patches, seconds, noise, grid=grid)
        deltas = tokenizer.encode_clip(patches, torch.zeros_like(patches[0, 0]), grid)
        return decode_future(tokenizer, patches[:, -1], world.rollout(deltas, seconds, noise), grid)

    modules = [world, encoder.encoder] + ([] if tokenizer is None else [tokenizer])
    return _measured(roll_out, lambda: [*(w for each in modules for w in each.parameters()), pixels], device)


def product_rate(device: torch.device, dtype: torch.dtype, seconds: float, side: int | None = None) -> float:
    """FLOP a second of square matrix products, the fastest of those that ``seconds`` allow, and of at least five."""
    side = side or (1024 if device.type == "cpu" else 8192)
    left, right = (torch.ones(side, side, device=device, dtype=dtype) for _ in range(2))
    shortest, started = float("inf"), time.perf_counter()

    def product() -> float:
        begun = time.perf_counter()
        result = left @ right
        if device.type != "cpu":
            result[0, 0].item()  # waits for it
        return time.perf_counter() - begun

    product()
    runs = 0
    while runs < 5 or time.perf_counter() - started < seconds:
        shortest, runs = min(shortest, product()), runs + 1
    return 2 * side**3 / shortest


def cpu_bfloat16_gain() -> float:
    """How many times as fast one core of this CPU multiplies in bfloat16 as in float32; below 1 where it converts."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on a busy machine several would wait for each other
    try:
        cpu = torch.device("cpu")
        single, half = (product_rate(cpu, dtype, 0.3, 512) for dtype in (torch.float32, torch.bfloat16))
    finally:
        torch.set_num_threads(threads)
    return half / single


def _measured(run: Callable[[], Any], held: Callable[[], Iterable[Tensor]], device: torch.device) -> Cost:
    run()  # kernels are chosen and moments made
    peak = _peak_on_cuda(run, device) if device.type == "cuda" else _peak_of_tensors(run, held())
    taken: list[float] = []
    while not taken or (len(taken) < _MOST_RUNS and sum(taken) < _ENOUGH_S):
        started = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - started)
    return Cost(min(taken), peak)


def _peak_on_cuda(run: Callable[[], Any], device: torch.device) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device)


def _peak_of_tensors(run: Callable[[], Any], held: Iterable[Tensor]) -> int:
    with LivingStorages(held) as storages:
        run()
    return storages.peak


class LivingStorages(TorchDispatchMode):
    """Follows the bytes of tensors that live: an allocator of a CPU tells nothing, and a process too much.

    What a kernel needs within itself is not seen.

    Attributes:
        peak: the most bytes at once, those of ``held`` included.
        held_bytes: those of ``held``.
    """

    def __init__(self, held: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self._seen: set[int] = set()
        self._live = self.peak = 0
        for tensor in held:
            self._follow(tensor)
        self.held_bytes = self._live

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for each in tree_leaves(out):
            if isinstance(each, Tensor):
                self._follow(each)
        return out

    def _follow(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes()
        if key in self._seen:
            return
        self._seen.add(key)
        self._live += size
        self.peak = max(self.peak, self._live)
        weakref.finalize(storage, self._forget, key, size).atexit = False

    def _forget(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self._live -= size
