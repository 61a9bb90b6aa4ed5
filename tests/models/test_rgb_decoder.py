"""The RGB decoder: the released code's numbers, what it undoes, and what does not fit."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from deltacache.models.backbone import IMAGENET, Backbone, load_backbone
from deltacache.models.checkpoints import save_model
from deltacache.models.rgb_decoder import FinalNorm, RgbDecoder, load_rgb_decoder, undo_backbone
from deltacache.schemas.errors import CheckpointError, MismatchError


@pytest.fixture
def decoder(golden: Path, golden_backbone: Backbone, heads: int) -> RgbDecoder:
    return load_rgb_decoder(golden / "tiny" / "head_rgb.safetensors", golden_backbone, heads).model


@pytest.mark.parametrize("name", ["rgb", "rgb_square"])
def test_golden_numbers_on_its_own_grid_and_a_wider_one(read, decoder: RgbDecoder, assert_golden, name: str):
    io = read("heads_io")
    rows, columns = io["features"].shape[-2:]
    with torch.inference_mode():
        pictures = decoder(io["features"][..., : columns if name == "rgb" else rows])
    assert_golden(pictures, io[name])


def test_a_new_decoder_has_the_released_positions(read, decoder: RgbDecoder) -> None:
    new = RgbDecoder(**decoder.arguments)
    assert torch.equal(new.decoder_pos_embed, read("head_rgb")["decoder_pos_embed"])
    assert not new.decoder_pos_embed.requires_grad


def test_the_norm_of_the_backbone_is_undone(read, decoder: RgbDecoder) -> None:
    features = read("heads_io")["features"]
    width = features.shape[1]
    gain, offset = torch.linspace(0.5, 2.0, width), torch.linspace(-1.0, 1.0, width)
    plain = decoder(features)
    decoder.undo(FinalNorm(gain, offset), IMAGENET)
    torch.testing.assert_close(decoder(features * gain[:, None, None] + offset[:, None, None]), plain)
    assert not torch.allclose(decoder(features), plain)


def test_the_norm_and_the_pixels_of_a_backbone_are_taken_from_it(golden: Path, decoder: RgbDecoder) -> None:
    backbone = load_backbone(str(golden / "tiny" / "backbone"))
    backbone.model.norm.weight.data.fill_(3.0)
    backbone.model.norm.bias.data.fill_(-1.0)
    backbone.image_mean = (0.1, 0.2, 0.3)
    undo_backbone(decoder, backbone)
    assert decoder.norm_weight.eq(3.0).all()
    assert decoder.norm_bias.eq(-1.0).all()
    assert decoder.mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])


def test_pictures_stay_within_0_and_1(read, decoder: RgbDecoder) -> None:
    features = read("heads_io")["features"]
    decoder.decoder_pred.weight.data.mul_(1000.0)
    pictures, free = decoder(features), decoder.unclamped(features)
    assert (pictures.min(), pictures.max()) == (0.0, 1.0)
    assert free.min() < 0.0
    assert free.max() > 1.0
    torch.testing.assert_close(free.clamp(0, 1), pictures)


def test_folders_and_bin_files_hold_the_same_decoder(
    read, decoder: RgbDecoder, golden_backbone: Backbone, heads: int, tmp_path: Path
) -> None:
    torch.save(read("head_rgb"), tmp_path / "pytorch_model.bin")
    released = load_rgb_decoder(tmp_path / "pytorch_model.bin", golden_backbone, heads)
    save_model(tmp_path / "ours", decoder, "rgb_decoder", {})
    ours = load_rgb_decoder(tmp_path / "ours", golden_backbone)
    assert ours.fingerprint == released.fingerprint
    features = read("heads_io")["features"]
    assert torch.equal(ours.model(features), released.model(features))


def test_the_released_size_tells_its_heads(golden_backbone: Backbone, tmp_path: Path) -> None:
    narrow = RgbDecoder(
        golden_backbone.hidden_size, width=144, layers=1, num_heads=2, mlp_width=8, image_size=32
    )
    save_file(narrow.state_dict(), tmp_path / "head.safetensors")
    loaded = load_rgb_decoder(tmp_path / "head.safetensors", golden_backbone)
    assert loaded.model.arguments == narrow.arguments


def test_what_does_not_fit_is_refused(
    golden: Path, golden_backbone: Backbone, read, heads: int, tmp_path: Path
):
    path = golden / "tiny" / "head_rgb.safetensors"
    with pytest.raises(
        CheckpointError, match="width of 48, which does not split into heads of 72: give num_heads"
    ):
        load_rgb_decoder(path, golden_backbone)
    with pytest.raises(CheckpointError, match="holds no RGB decoder"):
        load_rgb_decoder(golden / "tiny" / "head_seg.safetensors", golden_backbone)
    weights = load_file(path)
    del weights["trainable_cls_token"]
    save_file(weights, tmp_path / "head.safetensors")
    with pytest.raises(CheckpointError, match="1 missing: trainable_cls_token"):
        load_rgb_decoder(tmp_path / "head.safetensors", golden_backbone, heads)
    width = golden_backbone.hidden_size
    wide = RgbDecoder(width + 32, width=48, layers=1, num_heads=4, mlp_width=8, image_size=32)
    save_model(tmp_path / "wide", wide, "rgb_decoder", {})
    with pytest.raises(
        MismatchError, match=rf"{width}-wide tokens, but .* expects {width + 32}: give the decoder"
    ):
        load_rgb_decoder(tmp_path / "wide", golden_backbone)
    other = RgbDecoder(width, width=48, layers=1, num_heads=4, mlp_width=8, image_size=32)
    save_model(tmp_path / "other", other, "rgb_decoder", {"backbone_sha256": "ab" * 32})
    with pytest.raises(
        MismatchError, match=f"abababababababab, but .* has those of {golden_backbone.weights_sha256[:16]}"
    ):
        load_rgb_decoder(tmp_path / "other", golden_backbone)
