"""Encoders: batches, threads, precision and int8 must not change whose tokens are whose, nor their bits."""

import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import DINOv3ViTConfig, DINOv3ViTModel

from deltacache.models.backbone import IMAGENET, Backbone, load_backbone
from deltacache.models.deltatok import DeltaTok
from deltacache.pipeline.datasets.dataset import dequantise, dequantise_on_device, quantise
from deltacache.pipeline.work.encoders import (
    DeltaEncoder,
    FeatureEncoder,
    black_patch_tokens_of,
    build_feature_encoder,
    default_batch_clips,
    resolve_precision,
)
from deltacache.schemas.clips import CropBox, DeltaClip, FeatureClip, PixelClip
from deltacache.schemas.datasets import Precision
from deltacache.schemas.errors import DeltacacheError

CPU, FRAMES, SIZE = torch.device("cpu"), 3, 64
Encoded = Sequence[FeatureClip] | Sequence[DeltaClip]


def random_vit() -> Backbone:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 48,
        "intermediate_size": 100,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
    }
    config = DINOv3ViTConfig(**sizes, patch_size=16, num_register_tokens=4, image_size=64)
    return Backbone(DINOv3ViTModel(config), "random", IMAGENET)


BACKBONES = {"tiny": lambda: load_backbone("tiny"), "random": random_vit}


def pixel_clip(number: int, frames: int = FRAMES, size: int = SIZE) -> PixelClip:
    rng = np.random.default_rng(number)
    pixels = rng.integers(0, 256, (frames, size, size, 3), dtype=np.uint8)
    pixels.flags.writeable = False  # as Ray hands them over
    times, crop = np.arange(frames, dtype=np.float32), CropBox(0, 0, size, size)
    return PixelClip(f"clip-{number}", "v", 0, pixels, times, tuple(range(frames)), crop, False, "drawn", 0)


def delta_encoder(backbone: Backbone, batch_clips: int, precision: Precision = "float32") -> DeltaEncoder:
    torch.manual_seed(1)
    tokenizer = DeltaTok(backbone.hidden_size, backbone.hidden_size // 16, 2, 1, layer_scale_init=0.3)
    tokenizer.to_precision(precision)
    black = black_patch_tokens_of(backbone, SIZE)
    return DeltaEncoder(tokenizer, black, backbone.grid(SIZE), CPU, backbone, batch_clips)


def numbers(clip: FeatureClip | DeltaClip) -> list[np.ndarray]:
    if isinstance(clip, DeltaClip):
        return [clip.delta_tokens]
    return [clip.patch_tokens] if clip.scales is None else [clip.patch_tokens, clip.scales]


def encode_with(kind: str, backbone: Backbone, batch_clips: int) -> Callable[[list[PixelClip]], Encoded]:
    if kind == "deltas":
        return delta_encoder(backbone, batch_clips).encode
    if kind == "features to deltas":
        features, deltas = FeatureEncoder(backbone, CPU, batch_clips), delta_encoder(backbone, batch_clips)
        return lambda clips: deltas.encode_features(features.encode(clips))
    return FeatureEncoder(backbone, CPU, batch_clips, "int8" if kind == "int8" else "float16").encode


@pytest.mark.parametrize("kind", ["float16", "int8", "deltas", "features to deltas"])
@pytest.mark.parametrize("name", BACKBONES)
def test_tokens_do_not_depend_on_neighbours_or_place(name: str, kind: str) -> None:
    encode = encode_with(kind, BACKBONES[name](), 4)
    clips = [pixel_clip(number) for number in range(4)]
    alone = {clip.clip_id: numbers(encode([clip])[0]) for clip in clips}
    assert not np.array_equal(alone["clip-0"][0], alone["clip-1"][0])
    for order in ([0, 1, 2, 3], [3, 1, 0, 2], [2, 0], [1, 1, 1]):
        encoded = encode([clips[number] for number in order])
        assert [clip.clip_id for clip in encoded] == [f"clip-{number}" for number in order]
        for clip in encoded:
            for got, expected in zip(numbers(clip), alone[clip.clip_id], strict=True):
                np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("name", BACKBONES)
def test_an_encoder_gives_what_the_backbone_gives_frame_by_frame(name: str) -> None:
    backbone = BACKBONES[name]()
    clip = pixel_clip(0)
    (encoded,) = FeatureEncoder(backbone, CPU, 2).encode([clip])
    frames = [torch.from_numpy(frame.copy()).permute(2, 0, 1)[None] for frame in clip.pixels]
    expected = torch.cat([backbone.patch_tokens(frame) for frame in frames])
    assert encoded.patch_tokens.dtype == np.float16
    assert encoded.timestamps_s is clip.timestamps_s
    torch.testing.assert_close(
        torch.from_numpy(encoded.patch_tokens.copy()).float(), expected, atol=2e-3, rtol=2e-3
    )


@pytest.mark.parametrize("kind", ["int8", "deltas"])
def test_threads_share_an_encoder(kind: str) -> None:
    encode = encode_with(kind, load_backbone("tiny"), 2)
    clips = [pixel_clip(number) for number in range(16)]
    alone = {clip.clip_id: numbers(encode([clip])[0]) for clip in clips}
    wrong: list[str] = []

    def work(seed: int) -> None:
        order = np.random.default_rng(seed).permutation(16)
        for first, second in order.reshape(-1, 2):
            for clip in encode([clips[first], clips[second]]):
                if not all(map(np.array_equal, numbers(clip), alone[clip.clip_id])):
                    wrong.append(clip.clip_id)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_bfloat16_is_autocast_to_the_bit_with_its_weights_rounded_once() -> None:
    exact, fast = random_vit(), random_vit().to_precision("bfloat16_autocast")
    rounded = {name for name, p in fast.model.named_parameters() if p.dtype == torch.bfloat16}
    products = {name for name, part in fast.model.named_modules() if isinstance(part, nn.Linear)}
    assert {name.rpartition(".")[0] for name in rounded} == products
    assert {b.dtype for b in fast.buffers()} == {torch.float32}
    assert fast.weights_sha256 == exact.weights_sha256
    frames = torch.from_numpy(pixel_clip(0).pixels.copy()).permute(0, 3, 1, 2)
    expected, got = exact.patch_tokens(frames), fast.patch_tokens(frames)
    assert got.dtype == torch.float32
    error = (got - expected).norm() / expected.norm()
    assert 1e-4 < error < 2e-2
    exact._dtype = torch.bfloat16  # float32 weights under autocast, as the released code has it
    assert torch.equal(got, exact.patch_tokens(frames))
    assert load_backbone("tiny", "bfloat16_autocast").patch_tokens(frames).dtype == torch.float32
    with pytest.raises(ValueError, match="bfloat16 throughout is what older versions computed"):
        random_vit().to_precision("bfloat16")


def test_a_tokenizer_in_bfloat16_gives_the_same_from_pixels_and_from_features() -> None:
    backbone, clips = random_vit(), [pixel_clip(0), pixel_clip(1)]
    exact, fast = (delta_encoder(backbone, 2, each) for each in ("float32", "bfloat16_autocast"))
    features = FeatureEncoder(backbone, CPU, 2).encode(clips)
    for whole, split, other in zip(
        fast.encode(clips), fast.encode_features(features), exact.encode(clips), strict=True
    ):
        np.testing.assert_array_equal(whole.delta_tokens, split.delta_tokens)
        error = np.abs(whole.delta_tokens.astype(np.float32) - other.delta_tokens.astype(np.float32))
        assert 0 < error.max() < 0.1


def test_normalising_leaves_the_pixels_alone() -> None:
    frames = torch.rand(1, 3, SIZE, SIZE) * 255
    before = frames.clone()
    load_backbone("tiny").patch_tokens(frames)
    assert torch.equal(frames, before)


def test_int8_tokens_are_the_float16_ones_quantised() -> None:
    backbone, clip = load_backbone("tiny"), pixel_clip(0)
    (half,), (small,) = (
        FeatureEncoder(backbone, CPU, 1, dtype).encode([clip]) for dtype in ("float16", "int8")
    )
    assert half.scales is None
    assert small.scales is not None
    exact = half.patch_tokens.astype(np.float32)
    np.testing.assert_array_equal(small.scales, np.abs(exact).max(-1) / np.float32(127))
    np.testing.assert_array_equal(
        small.patch_tokens, np.rint(exact / small.scales[..., None]).astype(np.int8)
    )
    read = dequantise(small.patch_tokens, small.scales)
    np.testing.assert_array_equal(read, (small.patch_tokens * small.scales[..., None]).astype(np.float16))
    assert np.abs(read - exact).max() <= 0.51 * small.scales.max()


def test_quantising_rounds_half_to_even_and_keeps_zeros_and_extremes() -> None:
    tokens = torch.tensor(
        [[127.0, 0.5, 1.5, 2.5, -0.5, -127.0], [0.0] * 6, [6e-8] + [0.0] * 5, [65504.0] * 6]
    )
    values, scales = quantise(tokens)
    assert values.tolist()[:3] == [[127, 0, 2, 2, 0, -127], [0] * 6, [127] + [0] * 5]
    assert scales[0] == 1
    assert scales[1] == 0
    back = dequantise_on_device(values, scales)
    torch.testing.assert_close(back, tokens.half(), atol=0.5, rtol=1e-3)
    assert torch.equal(back[1:], tokens[1:].half())
    as_read = dequantise(values.numpy()[None], scales.numpy()[None])
    np.testing.assert_array_equal(as_read[0], back.numpy())


def test_tokens_that_are_no_numbers_are_refused() -> None:
    values, scales = quantise(torch.tensor([[[1.0, float("inf")], [2.0, 3.0]]]))
    with pytest.raises(ValueError, match=r"scales must be finite and not negative, .*tokens are not finite"):
        FeatureClip("a", values.numpy(), np.zeros(1, np.float32), scales.numpy())
    with pytest.raises(ValueError, match=r"float32\(1, 1\), must be float32\(1, 2\)"):
        FeatureClip("a", values.numpy(), np.zeros(1, np.float32), scales.numpy()[:, :1])
    with pytest.raises(ValueError, match=r"int8\(1, 2, 2\) without scales, must be float16"):
        FeatureClip("a", values.numpy(), np.zeros(1, np.float32))


def test_int8_features_give_the_deltas_of_what_readers_get() -> None:
    backbone = load_backbone("tiny")
    deltas, small = delta_encoder(backbone, 2), FeatureEncoder(backbone, CPU, 2, "int8")
    clips = small.encode([pixel_clip(0), pixel_clip(1)])
    read = [
        FeatureClip(clip.clip_id, dequantise(clip.patch_tokens, clip.scales), clip.timestamps_s)
        for clip in clips
        if clip.scales is not None
    ]
    for one, other in zip(deltas.encode_features(clips), deltas.encode_features(read), strict=True):
        np.testing.assert_array_equal(one.delta_tokens, other.delta_tokens)


def test_what_does_not_fit_into_a_batch_is_refused() -> None:
    backbone = load_backbone("tiny")
    encoder, deltas = FeatureEncoder(backbone, CPU, 2), delta_encoder(backbone, 2)
    assert encoder.encode([]) == []
    with pytest.raises(ValueError, match="3 clips are more than the 2 of a forward pass"):
        encoder.encode([pixel_clip(number) for number in range(3)])
    with pytest.raises(ValueError, match="clips of one forward pass must have the same shapes"):
        encoder.encode([pixel_clip(0), pixel_clip(1, frames=2)])
    (half,) = encoder.encode([pixel_clip(0)])
    (small,) = FeatureEncoder(backbone, CPU, 2, "int8").encode([pixel_clip(1)])
    with pytest.raises(ValueError, match="clips of one forward pass must have the same shapes"):
        deltas.encode_features([half, small])


def test_defaults_follow_the_device() -> None:
    assert [default_batch_clips(torch.device("cuda"), frames) for frames in (2, 8, 16, 100)] == [32, 8, 4, 1]
    assert default_batch_clips(CPU, 8) == 1
    assert build_feature_encoder("tiny", "cpu", frames=8).batch_clips == 1
    assert build_feature_encoder("tiny", "cpu", frames=8, batch_clips=3).batch_clips == 3
    assert resolve_precision("cpu") == resolve_precision(CPU) == "float32"
    for asked in ("bfloat16", "bfloat16_autocast"):
        assert resolve_precision("cpu", asked) == "bfloat16_autocast"
    with pytest.raises(
        DeltacacheError, match="precision 'half' is not known: give auto, float32 or bfloat16"
    ):
        resolve_precision("cpu", "half")  # pyright: ignore[reportArgumentType]
