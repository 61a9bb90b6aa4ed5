"""Encoders that are refused: weights that do not fit their config, models that give no patch tokens."""

import json
from pathlib import Path

import pytest
import transformers
from safetensors.torch import load_file, save_file

from deltacache.models.backbone import load_backbone
from deltacache.schemas.errors import CheckpointError
from drawn_encoders import FAMILIES

WIDTH, TRAINED = 48, 4


@pytest.mark.parametrize("family", FAMILIES)
def test_missing_weights_are_refused(family: str, tmp_path: Path) -> None:
    FAMILIES[family].save(tmp_path, WIDTH, TRAINED * FAMILIES[family].patch)
    path = tmp_path / "model.safetensors"
    state = load_file(path)
    gone = next(name for name in sorted(state) if ".1." in name and "predictor" not in name)
    save_file({name: part for name, part in state.items() if name != gone}, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks 1 weights of a \w+, the first is"):
        load_backbone(str(tmp_path))


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_of_a_deeper_model_are_refused(family: str, tmp_path: Path) -> None:
    FAMILIES[family].save(tmp_path, WIDTH, TRAINED * FAMILIES[family].patch)
    config = json.loads((tmp_path / "config.json").read_text())
    for name in ("out_features", "out_indices", "stage_names"):  # name layers that there are no more
        config.pop(name, None)
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    with pytest.raises(CheckpointError, match=r"holds \d+ weights of more layers than its config.json says"):
        load_backbone(str(tmp_path))


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_of_another_width_are_refused(family: str, tmp_path: Path) -> None:
    FAMILIES[family].save(tmp_path, WIDTH, TRAINED * FAMILIES[family].patch)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "hidden_size": 2 * WIDTH}))
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_backbone(str(tmp_path))


REFUSED = {
    "DINOv3ConvNextModel": ("DINOv3ConvNextConfig", {"hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1]}),
    "VideoMAEModel": ("VideoMAEConfig", {"image_size": 32, "num_frames": 2}),
    "Data2VecAudioModel": (
        "Data2VecAudioConfig",
        {"conv_dim": (8, 8), "conv_stride": (2, 2), "conv_kernel": (2, 2)},
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_gives_no_patch_tokens_is_refused(name: str, tmp_path: Path) -> None:
    config, settings = REFUSED[name]
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    sizes = {} if "hidden_sizes" in settings else sizes
    model = getattr(transformers, name)(getattr(transformers, config)(**sizes, **settings))
    model.save_pretrained(tmp_path)
    with pytest.raises(
        CheckpointError, match=rf"is a {name}, which does not turn an image .*: take a vision"
    ):
        load_backbone(str(tmp_path))
