"""Pixels as the image processors of transformers prepare them, for every setting that influences them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from deltacache.models.backbone import load_backbone, read_normalisation
from deltacache.models.flops import encoder_on
from deltacache.schemas.errors import CheckpointError
from drawn_encoders import FAMILIES, frames

COLOURS = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
SETTINGS: dict[str, dict[str, Any]] = {
    "nothing said": {},
    "mean and std": COLOURS,
    "no rescaling": {**COLOURS, "do_rescale": False},
    "another factor": {**COLOURS, "rescale_factor": 1 / 127.5},
    "factor without rescaling": {**COLOURS, "do_rescale": False, "rescale_factor": 0.5},
    "no normalising": {**COLOURS, "do_normalize": False},
    "another factor, no normalising": {"rescale_factor": 0.01, "do_normalize": False},
    "neither": {"do_rescale": False, "do_normalize": False},
    "nulls": {"image_mean": None, "do_rescale": None, "do_normalize": None},
    "one number": {"image_mean": 0.25, "image_std": 0.5},
}
KINDS = {
    "dinov2": "Bit",
    "vit": "ViT",
    "siglip": "Siglip",
    "siglip2": "Siglip2",
    "clip": "CLIP",
    "beit": "Beit",
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=list(SETTINGS))
def test_pixels_are_those_of_the_processor_of_transformers(settings: dict[str, Any], tmp_path: Path) -> None:
    image = frames(1, 32, 48)[0]
    for model_type, name in KINDS.items():
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
        for named in ({}, {"image_processor_type": f"{name}ImageProcessorFast"}):
            path = tmp_path / "preprocessor_config.json"
            path.write_text(json.dumps({**named, **settings}))
            mean, std = (
                torch.tensor(part).view(3, 1, 1) for part in read_normalisation(tmp_path, model_type)
            )
            ours = (image / 255 - mean) / std
            processor = getattr(transformers, f"{name}ImageProcessorPil").from_pretrained(tmp_path)
            if name == "Siglip2":
                processor.patch_size, processor.max_num_patches = 16, 6
                patches = ours.unfold(1, 16, 16).unfold(2, 16, 16).permute(1, 2, 3, 4, 0).reshape(6, -1)
                theirs = processor(image.permute(1, 2, 0).numpy(), return_tensors="pt")["pixel_values"][
                    0
                ].float()
                torch.testing.assert_close(patches, theirs, atol=2e-5, rtol=2e-5)
                continue
            geometry = {"do_resize": False, "do_center_crop": False}
            geometry = {key: value for key, value in geometry.items() if hasattr(processor, key)}
            theirs = processor(image.permute(1, 2, 0).numpy(), return_tensors="pt", **geometry)[
                "pixel_values"
            ][0]
            torch.testing.assert_close(ours, theirs.float(), atol=2e-5, rtol=2e-5)


def test_the_section_for_images_goes_before_other_files(tmp_path: Path) -> None:
    """As transformers looks for them: a processor's own section, then preprocessor_config.json."""
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(COLOURS))
    assert read_normalisation(tmp_path, "vit").mean == (0.1, 0.2, 0.3)
    nested = {"image_processor": {"image_processor_type": "ViTImageProcessor", "image_mean": [0.7, 0.8, 0.9]}}
    (tmp_path / "processor_config.json").write_text(json.dumps(nested))
    assert read_normalisation(tmp_path, "vit") == ((0.7, 0.8, 0.9), (0.5, 0.5, 0.5))
    assert transformers.ViTImageProcessorPil.from_pretrained(tmp_path).image_mean == (0.7, 0.8, 0.9)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"do_flip_channel_order": True},
            "sets do_flip_channel_order to True, which .* is not followed here",
        ),
        ({"image_processor_type": "MobileViTImageProcessor"}, "sets do_flip_channel_order to True"),
        ({"offset": True}, "sets offset to True"),
        ({"image_std": [0, 1, 1]}, "must be positive"),
        ({"rescale_factor": 0}, "must be positive"),
        ({"image_mean": None}, "does not hold image_mean"),
        ({"rescale_factor": "x"}, "does not hold image_mean and image_std"),
        ({"image_mean": [float("nan")] * 3}, "must be finite"),
        ([1], "is not a mapping of settings"),
    ],
)
def test_settings_that_cannot_be_followed_are_refused(settings: Any, message: str, tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match=message):
        read_normalisation(tmp_path, "vit")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_byte_order_marks_in_a_backbones_json(encoding: str, tmp_path: Path) -> None:
    FAMILIES["dinov2"].save(tmp_path, 48, 56)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(COLOURS))
    before = load_backbone(str(tmp_path))
    for path in tmp_path.glob("*.json"):
        path.write_text(path.read_text(), encoding=encoding)
    marked = load_backbone(str(tmp_path))
    assert marked.weights_sha256 == before.weights_sha256
    assert marked.image_mean == (0.1, 0.2, 0.3)


def test_timm_and_quantised_backbones_are_refused_with_what_to_take(tmp_path: Path) -> None:
    FAMILIES["dinov2"].save(tmp_path, 48, 56)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "quantization_config": {"quant_method": "bitsandbytes"}}))
    with pytest.raises(
        CheckpointError, match=r"quantised weights \(bitsandbytes\), which are not read.*: take the"
    ):
        load_backbone(str(tmp_path))
    path.write_text(json.dumps({"architecture": "vit_base_patch16_224", "pretrained_cfg": {}}))
    with pytest.raises(
        CheckpointError, match=r"a model of timm \(vit_base_patch16_224\).*: take the same encoder"
    ):
        load_backbone(str(tmp_path))
    with pytest.raises(CheckpointError, match="a model of timm"):
        encoder_on("meta", str(tmp_path))
    # a model that transformers builds with a package that is not here
    path.write_text(
        json.dumps({**config, "model_type": "detr", "use_timm_backbone": True, "backbone": "resnet50"})
    )
    with pytest.raises(CheckpointError, match=r"needs a package that is not installed: .*timm.*install"):
        load_backbone(str(tmp_path))
