"""FLOP, time and memory of models: counted on the meta device, measured on this machine (the paper's Table 2)."""

import re
import time
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.module_tracker import ModuleTracker

from deltacache.models.backbone import quiet_transformers, readable_folder, tiny_encoder
from deltacache.models.deltatok import DeltaTok
from deltacache.models.devices import autocast_to, shapes_only
from deltacache.models.encoders import InputConvention, convention_of
from deltacache.models.futures import decode_future
from deltacache.models.optimizer_groups import decay_groups
from deltacache.models.query_world import QueryWorld
from deltacache.models.selection import select_winning_frames, selection_for
from deltacache.models.world_model import IN_FULL, Grid, WorldModel
from deltacache.schemas.errors import CheckpointError, DeltacacheError, MismatchError

if TYPE_CHECKING:
    from transformers import PretrainedConfig


# ----------------------------------------------------------------------------------------------------
# Image encoders on the meta device: their sizes without their weights.
# ----------------------------------------------------------------------------------------------------


# hidden size, blocks, heads, width of the MLP, whether it is gated: DINOv3 on 16-px patches, 4 registers
_DINOV3 = {
    "vits16": (384, 12, 6, 1536, False),
    "vits16plus": (384, 12, 6, 1536, True),
    "vitb16": (768, 12, 12, 3072, False),
    "vitl16": (1024, 24, 16, 4096, False),
    "vith16plus": (1280, 32, 20, 5120, True),
    "vit7b16": (4096, 40, 32, 8192, True),
}
# hidden size, blocks, heads: DINOv2 on 14-px patches, 4 registers
_DINOV2 = {"small": (384, 12, 6), "base": (768, 12, 12), "large": (1024, 24, 16)}
NAMES = ("tiny", *_DINOV3, *(f"dinov2-with-registers-{size}" for size in _DINOV2))


def encoder_on(device: str | torch.device, source: str) -> InputConvention:
    """An encoder of random or, on meta, no weights: one of ``NAMES``, its hub id, or a folder with config.json.

    Raises:
        DeltacacheError: none of these.
    """
    from transformers import AutoModel

    try:
        config = _config(source)
        with torch.device(device), quiet_transformers():
            return convention_of(AutoModel.from_config(config).eval(), source)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"backbone {source!r} cannot be built from its config: {error}. Give a folder whose config.json is that "
            "of a vision transformer that transformers knows"
        ) from error


def short_name(source: str) -> str:
    """``vitb16`` of ``facebook/dinov3-vitb16-pretrain-lvd1689m``."""
    return re.sub(r"^(?:facebook/)?(?:dinov3-)?(.+?)(?:-pretrain-\w+)?$", r"\1", source)


def _config(source: str) -> "PretrainedConfig":
    from transformers import AutoConfig, Dinov2WithRegistersConfig, DINOv3ViTConfig

    if source == "tiny":
        return tiny_encoder().config
    if (Path(source).expanduser() / "config.json").is_file():
        with readable_folder(Path(source).expanduser(), source) as folder:
            return AutoConfig.from_pretrained(folder, local_files_only=True)
    name = short_name(source)
    if name in _DINOV3:
        hidden_size, blocks, heads, width, gated = _DINOV3[name]
        return DINOv3ViTConfig(
            hidden_size=hidden_size,
            num_hidden_layers=blocks,
            num_attention_heads=heads,
            intermediate_size=width,
            use_gated_mlp=gated,
            num_register_tokens=4,
        )
    size = name.removeprefix("dinov2-with-registers-")
    if name != size and size in _DINOV2:
        hidden_size, blocks, heads = _DINOV2[size]
        return Dinov2WithRegistersConfig(
            hidden_size=hidden_size,
            num_hidden_layers=blocks,
            num_attention_heads=heads,
            patch_size=14,
            image_size=518,
        )
    raise DeltacacheError(
        f"backbone {source!r} is not known here: give one of {', '.join(NAMES)}, or a folder with a config.json"
    )


# ----------------------------------------------------------------------------------------------------
# Counting the FLOP of whatever runs: torch's counter, with every kernel of attention registered.
#
# A multiplication and the addition behind it are 2 FLOP; only matrix products, convolutions and attention
# count. Torch's own table lacks several kernels of ``scaled_dot_product_attention``, the CPU's among them,
# and takes them for nothing.
# ----------------------------------------------------------------------------------------------------


Shape = torch.Size
_aten: Any = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Flops:
    """FLOP of one computation.

    Attributes:
        total: of all products.
        attention: those of queries with keys and of weights with values, in the forward pass; part of ``total``.
    """

    total: int
    attention: int = 0

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(self.total + other.total, self.attention + other.attention)

    def __mul__(self, times: int) -> "Flops":
        return Flops(self.total * times, self.attention * times)

    @property
    def attention_twice(self) -> int:
        """What comes out if attention is counted as one operation and once more as the products in it."""
        return self.total + self.attention


def count_flops(run: Callable[[], Any]) -> Flops:
    """FLOP of what ``run`` does, on any device; tensors on meta are counted without being computed.

    Raises:
        NotImplementedError: it runs an attention kernel that has no formula here.
    """
    counter = FlopCounterMode(display=False, custom_mapping=_FORMULAS)
    counter.mod_tracker = _NoModules()
    with _UnknownAttention(counter), counter, _AttentionShare(counter) as share:
        run()
    return Flops(counter.get_total_flops(), share.flop)


class _NoModules(ModuleTracker):
    """Follows no modules: its hooks refuse views that were made without gradients, and take half of the time."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class _AttentionShare(TorchFunctionMode):
    """How much of what is counted happens within ``scaled_dot_product_attention``, whatever it is made of."""

    def __init__(self, counter: FlopCounterMode) -> None:
        super().__init__()
        self._counter, self.flop = counter, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = self._counter.get_total_flops()
        out = func(*args, **(kwargs or {}))
        if func is F.scaled_dot_product_attention:
            self.flop += self._counter.get_total_flops() - before
        return out


class _UnknownAttention(TorchDispatchMode):
    """Refuses attention that the counter would take for nothing."""

    def __init__(self, counter: FlopCounterMode) -> None:
        super().__init__()
        self._known = counter.flop_registry

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = func._overloadpacket
        if "attention" in str(packet) and packet not in self._known:
            raise NotImplementedError(
                f"{packet} has no formula, so its products would not count: add one to {__name__}._FORMULAS"
            )
        return func(*args, **(kwargs or {}))


def _attention(query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    """Scores, and values mixed by them: query (..., Q, d), key (..., T, d), value (..., T, v)."""
    return 2 * query.numel() * key[-2] + 2 * query[:-1].numel() * key[-2] * value[-1]


def _attention_backward(_gradient: Shape, query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    """The scores again, then the gradients of weights, values, queries and keys."""
    with_keys, with_values = 2 * query.numel() * key[-2], 2 * query[:-1].numel() * key[-2] * value[-1]
    return 3 * with_keys + 2 * with_values


def _added_product(_added: Shape, left: Shape, right: Shape, *_: Any, **__: Any) -> int:
    return 2 * left.numel() * right[-1]


_FORMULAS: dict[Any, Callable[..., int]] = {
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    _aten._scaled_dot_product_fused_attention_overrideable: _attention,
    _aten._scaled_dot_product_fused_attention_overrideable_backward: _attention_backward,
    _aten._scaled_dot_product_attention_math_for_mps: _attention,
    _aten.baddbmm_: _added_product,
    _aten.addmm_: _added_product,
}


# ----------------------------------------------------------------------------------------------------
# FLOP of the parts of a system, each counted from the model itself on the meta device.
#
# Models are given as they are, on any device; what is counted is their copy without weights.
# ----------------------------------------------------------------------------------------------------


# C context, H horizon, S samples, T frames, M tokens of a frame, D hidden, Z noise


META = torch.device("meta")
ModelT = TypeVar("ModelT", bound=DeltaTok | WorldModel)


def rebuilt(model: ModelT, device: torch.device = META, **changes: Any) -> ModelT:
    """A new model of the same class and arguments, but for ``changes``; on meta it holds no numbers."""
    build = cast(Callable[..., ModelT], type(model))
    with shapes_only() if device == META else torch.device(device):
        return build(**{**model.arguments, **changes}).eval()


def backbone_flops(encoder: InputConvention, image_size: tuple[int, int]) -> Flops:
    """One frame of rows x columns of pixels, through an encoder on meta."""
    pixels = torch.empty(1, 3, *image_size, device=META)
    with torch.no_grad():
        return count_flops(lambda: encoder.hidden_states(pixels))


@torch.no_grad()
def encoder_flops(tokenizer: DeltaTok, grid: Grid) -> Flops:
    """The delta token, or tokens, of one frame."""
    frame = _patches(tokenizer, grid)
    model = rebuilt(tokenizer)
    return count_flops(lambda: model.encode(frame, frame, grid))


@torch.no_grad()
def decoder_flops(tokenizer: DeltaTok, grid: Grid) -> Flops:
    """One frame from its delta token, or tokens."""
    frame, model = _patches(tokenizer, grid), rebuilt(tokenizer)
    tokens = model.encode(frame, frame, grid)
    return count_flops(lambda: model.decode(tokens, frame, grid))


def predictor_flops(world: WorldModel, context: int, grid: Grid) -> Flops:
    """One frame of one future after ``context`` frames, nothing known of them but their tokens."""
    return rollout_flops(world, context, 1, 1, grid)


def rollout_flops(world: WorldModel, context: int, horizon: int, samples: int, grid: Grid) -> Flops:
    """``samples`` futures of one context at once, as the model rolls them out; 1 where nothing is random."""
    model = rebuilt(world)
    tokens = torch.empty(tokens_shape(model, 1, context, grid), device=META)
    seconds = torch.empty(1, context + horizon, device=META)
    noise = None
    if model.stochastic:
        noise = torch.empty(1, samples, horizon, model.noise_width(grid), device=META)
    return count_flops(lambda: model.rollout(tokens, seconds, noise, grid=grid))


def tokens_shape(world: WorldModel, batch: int, frames: int, grid: Grid) -> tuple[int, ...]:
    """Of the clips that a world model is given: (B, T, D) or (B, T, M, D)."""
    if world.trains_on == "features":
        return batch, frames, grid[0] * grid[1], world.hidden_size
    count = world.arguments.get("tokens_per_frame", 1)
    return (batch, frames, *([count] if count > 1 else []), world.hidden_size)


def _patches(tokenizer: DeltaTok, grid: Grid) -> Tensor:
    return torch.empty(1, grid[0] * grid[1], tokenizer.hidden_size, device=META)


# ----------------------------------------------------------------------------------------------------
# FLOP of a training step of one clip: best-of-many is K forwards to choose, and one with its backward to
# learn; other objectives learn from all that they compute.
# ----------------------------------------------------------------------------------------------------


# B batch, T frames, P = T - 1 predicted frames, K candidates, M tokens of a frame, D hidden, Z noise


_BETA = 0.1


@dataclass(frozen=True, slots=True)
class StepFlops:
    """FLOP of a step a clip, from cached tokens.

    Attributes:
        selection: every candidate of every frame through the whole predictor, the method's plain definition.
        learning: the winners with gradient: forward and backward.
        here: all that a step of this package multiplies; it chooses with fewer products (``models/selection``).
    """

    selection: int
    learning: int
    here: int

    @property
    def plain(self) -> int:
        """The step by the method's definition."""
        return self.selection + self.learning


def training_step_flops(world: WorldModel, frames: int, grid: Grid, candidates: int) -> StepFlops:
    """Of one clip of ``frames`` frames; ``candidates`` matter where futures are random.

    The plain definition is known of models with queries; of others what they do is what is asked.
    """
    here = _step(rebuilt(world), frames, grid, candidates)
    if not (isinstance(world, QueryWorld) and world.stochastic and world.objective == "best_of_many"):
        return StepFlops(0, here, here)
    learning = _step(rebuilt(world, query="learned"), frames, grid, 1)
    folded = world.tokens_of_a_frame(grid) == 1 and world.places is None
    selection = _plain_selection(world, frames, grid, candidates) if folded else here - learning
    return StepFlops(selection, learning, here)


def _step(model: WorldModel, frames: int, grid: Grid, candidates: int) -> int:
    tokens = torch.empty(tokens_shape(model, 1, frames, grid), device=META)
    seconds = torch.empty(1, frames, device=META)
    noise = None
    if model.stochastic:
        noise = torch.empty(1, frames - 1, candidates, model.noise_width(grid, training=True), device=META)

    def step() -> None:
        wanted = candidates if model.stochastic else 1
        result = model.training_loss(
            tokens, seconds, grid=grid, candidates=wanted, beta=_BETA, noise=noise, selection=IN_FULL
        )
        result.loss.backward()

    return count_flops(step).total


@torch.no_grad()
def _plain_selection(world: QueryWorld, frames: int, grid: Grid, candidates: int) -> int:
    model = rebuilt(world)
    count, steps = model.tokens_of_a_frame(grid), frames - 1
    seconds = torch.empty(1, steps, device=META)
    past = model.remember(torch.empty(1, steps, count, model.hidden_size, device=META), seconds, grid)
    rotation = model.rotation(seconds, grid)
    targets = torch.empty(1, steps, count, model.hidden_size, device=META)
    noise = torch.empty(1, steps, candidates, model.noise_size, device=META)

    def choose() -> Tensor:
        return select_winning_frames(model.predictor, noise, _spread, rotation, past, targets, _BETA, IN_FULL)

    return count_flops(choose).total


def _spread(queries: Tensor, count: int) -> Tensor:
    """(..., Z) to (..., M, Z): places that are added to them cost no product."""
    return queries[..., None, :].expand(*queries.shape[:-1], count, -1)


# ----------------------------------------------------------------------------------------------------
# FLOP of whole systems: futures of an image, and training from videos or from a cache (the paper's Table 2).
# ----------------------------------------------------------------------------------------------------


# C context, H horizon, S samples, T frames of a clip, K candidates


_NOTHING = Flops(0)


@dataclass(frozen=True, slots=True)
class CountedSystem:
    """A world model and, where it predicts delta tokens, their tokenizer; on any device.

    Attributes:
        candidates: K of its training.
    """

    name: str
    world: WorldModel
    tokenizer: DeltaTok | None
    candidates: int


@dataclass(frozen=True, slots=True)
class Setting:
    """What is asked of all systems alike.

    Attributes:
        image_size: rows and columns of pixels of a crop.
        crops: of an image.
        frames: of a training clip.
    """

    image_size: tuple[int, int]
    context: int
    horizon: int
    samples: int
    crops: int
    frames: int


@dataclass(frozen=True, slots=True)
class SystemFlops:
    """Of one crop, in the setting.

    Attributes:
        encoder: one token, or tokens, of a frame; nothing where patch tokens are predicted.
        decoder: one frame.
        predictor: one frame of one future, by frames of context.
        rollout: all futures as this package rolls them out, without the other parts.
        samples: S, 1 where nothing is random.
        step: one training step of one clip, from cached tokens.
        frozen_step: what the online trainer does before it: the backbone of the clip's frames, the encoder of each.
            With delta compression a black frame goes before them.
    """

    backbone: Flops
    encoder: Flops
    decoder: Flops
    predictor: Mapping[int, Flops]
    rollout: Flops
    samples: int
    step: StepFlops
    frozen_step: Flops


@dataclass(frozen=True, slots=True)
class Totals:
    """FLOP of all futures of one image, its crops together.

    Attributes:
        paper: by its convention: every future predicted from its whole context at every step, the predictor's
            attention counted twice.
        exact: the same passes, attention once.
        here: what this package multiplies: keys and values of a frame are computed once and kept.
    """

    paper: int
    exact: int
    here: int


def system_flops(system: CountedSystem, grid: Grid, backbone: Flops, setting: Setting) -> SystemFlops:
    """Count every part of ``system`` on patches of ``grid``; ``backbone`` is what a frame needs."""
    tokenizer, world = system.tokenizer, system.world
    encoding = encoder_flops(tokenizer, grid) if tokenizer else _NOTHING
    samples = setting.samples if world.stochastic else 1
    black = tokenizer is not None and tokenizer.frame_compression == "off"
    contexts = range(setting.context, setting.context + setting.horizon)
    return SystemFlops(
        backbone=backbone,
        encoder=encoding,
        decoder=decoder_flops(tokenizer, grid) if tokenizer else _NOTHING,
        predictor={context: predictor_flops(world, context, grid) for context in contexts},
        rollout=rollout_flops(world, setting.context, setting.horizon, samples, grid),
        samples=samples,
        step=training_step_flops(world, setting.frames, grid, system.candidates),
        frozen_step=backbone * (setting.frames + black) + encoding * setting.frames,
    )


def totals(flops: SystemFlops, setting: Setting) -> Totals:
    """Of one image."""
    seen = (flops.backbone + flops.encoder) * setting.context
    decoded = flops.decoder * (flops.samples * setting.horizon)
    predicted = sum(flops.predictor.values(), _NOTHING) * flops.samples
    around = seen.total + decoded.total
    return Totals(
        paper=setting.crops * (around + predicted.attention_twice),
        exact=setting.crops * (around + predicted.total),
        here=setting.crops * (around + flops.rollout.total),
    )


def image_flops(encoder: InputConvention, setting: Setting) -> Flops:
    """One frame through the backbone.

    Raises:
        MismatchError: as ``grid_of``.
    """
    grid_of(encoder, setting.image_size)
    return backbone_flops(encoder, setting.image_size)


def grid_of(encoder: InputConvention, image_size: tuple[int, int]) -> Grid:
    """Rows and columns of patches.

    Raises:
        MismatchError: the sides are no multiples of the patch size.
    """
    size = encoder.patch_size
    rows, columns = image_size
    if rows % size or columns % size or not (rows and columns):
        nearest = [max(1, round(side / size)) * size for side in image_size]
        raise MismatchError(
            f"image size {rows} x {columns} is not a multiple of the backbone's patch size {size}: take for example "
            f"{nearest[0]} x {nearest[1]}"
        )
    return rows // size, columns // size


# ----------------------------------------------------------------------------------------------------
# Time and memory on this machine, with random weights and tokens.
# ----------------------------------------------------------------------------------------------------


# B batch, T frames, K candidates, S samples, H horizon, Z noise


_MOST_RUNS, _ENOUGH_S = 20, 3.0
_SPACING_S = 0.2


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
            width = model.noise_width(grid, training=True)
            noise = torch.randn(batch_size, frames - 1, wanted, width, device=device)
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


def futures_cost(
    system: CountedSystem, encoder: InputConvention, setting: Setting, device: torch.device
) -> Cost:
    """All futures of one crop as patch tokens, from the pixels of its context; bfloat16 products on CUDA.

    ``encoder`` is on ``device``; random tokens of the width that the models take stand for what it answers.
    """
    grid = grid_of(encoder, setting.image_size)
    products = torch.bfloat16 if device.type == "cuda" else None
    precision = "float32" if products is None else "bfloat16_autocast"
    world = rebuilt(system.world, device).to_precision(precision)
    tokenizer = (
        None if system.tokenizer is None else rebuilt(system.tokenizer, device).to_precision(precision)
    )
    pixels = torch.randn(setting.context, 3, *setting.image_size, device=device)
    seconds = torch.arange(setting.context + setting.horizon, device=device)[None] * _SPACING_S
    noise = None
    if world.stochastic:
        noise = torch.randn(1, setting.samples, setting.horizon, world.noise_width(grid), device=device)
    width = world.hidden_size if tokenizer is None else tokenizer.hidden_size
    patches = torch.randn(1, setting.context, grid[0] * grid[1], width, device=device)

    @torch.no_grad()
    def roll_out() -> Tensor:
        with autocast_to(device.type, products):
            encoder.hidden_states(pixels)
        if tokenizer is None:
            return world.rollout(patches, seconds, noise, grid=grid)
        deltas = tokenizer.encode_clip(patches, torch.zeros_like(patches[0, 0]), grid)
        return decode_future(tokenizer, patches[:, -1], world.rollout(deltas, seconds, noise), grid)

    modules = [world, encoder.encoder] + ([] if tokenizer is None else [tokenizer])
    return _measured(roll_out, lambda: [*(w for each in modules for w in each.parameters()), pixels], device)


def product_rate(device: torch.device, dtype: torch.dtype, seconds: float, side: int | None = None) -> float:
    """FLOP per second of square matrix products, the fastest of those that ``seconds`` allow: at least five, or fewer
    where these would take five times as long."""
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
    while (
        (taken := time.perf_counter() - started) < seconds or not runs or (runs < 5 and taken < 5 * seconds)
    ):
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
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device)
    else:
        with LivingStorages(held()) as storages:
            run()
        peak = storages.peak
    taken: list[float] = []
    while not taken or (len(taken) < _MOST_RUNS and sum(taken) < _ENOUGH_S):
        started = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - started)
    return Cost(min(taken), peak)


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
