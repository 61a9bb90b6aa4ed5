"""Frozen encoders: golden patch tokens, other ViTs, and what is refused."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import huggingface_hub
import pytest
import torch
import transformers
from huggingface_hub import ResolvedRevision
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError

from deltacache.models.backbone import IMAGENET, load_backbone
from deltacache.schemas.errors import CheckpointError, MismatchError

SMALL = {
    "hidden_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 32,
    "patch_size": 16,
}
# model class, config class, further settings, tokens before the patches
OTHER_VITS = {
    "dinov2": ("Dinov2Model", "Dinov2Config", {}, 1),
    "dinov2 with registers": (
        "Dinov2WithRegistersModel",
        "Dinov2WithRegistersConfig",
        {"num_register_tokens": 3},
        4,
    ),
    "dinov3 with SwiGLU": ("DINOv3ViTModel", "DINOv3ViTConfig", {"use_gated_mlp": True}, 1),
    "vit": ("ViTModel", "ViTConfig", {}, 1),
    "deit": ("DeiTModel", "DeiTConfig", {}, 2),
    "ijepa": ("IJepaModel", "IJepaConfig", {}, 0),
    "siglip": ("SiglipVisionModel", "SiglipVisionConfig", {}, 0),
}


def _save(folder: Path, model_name: str, config_name: str, settings: dict) -> torch.nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, config_name)(**SMALL, **settings)
    model = getattr(transformers, model_name)(config).eval()
    model.save_pretrained(folder)
    return model


def _frames(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def vit_folder(tmp_path):
    _save(tmp_path, "ViTModel", "ViTConfig", {})
    return tmp_path


def test_golden_patch_tokens(golden_backbone, read, grid, assert_golden):
    io = read("deltatok_released_io")
    tokens = golden_backbone.patch_tokens(io["frames"].flatten(0, 1))
    assert_golden(tokens, io["patch_tokens"].flatten(0, 1))
    side = io["frames"].shape[-1]
    assert golden_backbone.grid(side) == grid
    assert_golden(golden_backbone.black_patch_tokens(side), io["black_patch_tokens"][0])


@pytest.mark.parametrize("name", OTHER_VITS)
def test_other_vits_give_their_patch_tokens(name, tmp_path):
    model_name, config_name, settings, prefix = OTHER_VITS[name]
    model = _save(tmp_path, model_name, config_name, settings)
    backbone = load_backbone(str(tmp_path))
    frames = _frames(2, 3, 32, 32)
    mean, std = (torch.tensor(part).view(3, 1, 1) for part in (backbone.image_mean, backbone.image_std))
    with torch.no_grad():
        expected = model((frames / 255 - mean) / std).last_hidden_state[:, prefix:]
    torch.testing.assert_close(backbone.patch_tokens(frames), expected)
    assert (backbone.patch_size, backbone.hidden_size) == (16, 24)
    assert backbone.patch_tokens(_frames(1, 3, 64, 48)).shape == (1, 12, 24)
    assert load_backbone(str(tmp_path)).weights_sha256 == backbone.weights_sha256


def test_the_image_side_of_two_towers(tmp_path):
    text = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    text |= {"vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(0)
    model = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=SMALL)).eval()
    model.save_pretrained(tmp_path)
    assert load_backbone(str(tmp_path)).patch_tokens(_frames(2, 3, 32, 32)).shape == (2, 4, 24)


def test_normalisation_is_read_when_there_is_one(vit_folder):
    assert load_backbone(str(vit_folder)).image_mean == IMAGENET.mean
    settings = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25]}
    (vit_folder / "preprocessor_config.json").write_text(json.dumps(settings))
    backbone = load_backbone(str(vit_folder))
    assert (backbone.image_mean, backbone.image_std) == ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    frames = _frames(1, 3, 32, 32)
    expected = backbone.model((frames / 255 - 0.5) / 0.25).last_hidden_state[:, 1:]
    torch.testing.assert_close(backbone.patch_tokens(frames), expected)
    (vit_folder / "preprocessor_config.json").write_text(json.dumps({"do_normalize": False}))
    assert load_backbone(str(vit_folder)).image_std == (1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read as JSON settings"),
        ("[]", "is not a mapping of settings"),
        ('{"image_mean": [1, 2]}', "does not hold image_mean and image_std"),
        ('{"image_std": "3"}', "does not hold image_mean and image_std"),
    ],
)
def test_damaged_normalisation_is_refused(vit_folder, content, message):
    (vit_folder / "preprocessor_config.json").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        load_backbone(str(vit_folder))


def test_tiny_is_the_same_everywhere():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = load_backbone("tiny")
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    second = load_backbone("tiny")
    assert first.weights_sha256 == second.weights_sha256
    assert first.weights_sha256.startswith("fd91553c3ef9d70c")
    assert (first.id, first.patch_size, first.hidden_size, first.grid(64)) == ("tiny", 16, 64, (4, 4))
    frames = _frames(2, 3, 64, 64)
    assert torch.equal(first.patch_tokens(frames), second.patch_tokens(frames))


def test_tiny_tells_content_and_place_apart():
    backbone = load_backbone("tiny")
    frames = torch.full((3, 3, 64, 64), 80, dtype=torch.uint8)
    frames[1, 0, 16:32, 16:32] = 220
    frames[2, 0, 16:32, 32:48] = 220
    empty, here, there = backbone.patch_tokens(frames)
    change = (here - empty).square().mean(-1).sqrt()
    assert change.argmax() == 5
    assert change[5] > 1.0
    assert 0.02 < change[torch.arange(16) != 5].mean() < 0.4  # the rest of the image hears of it
    assert (here - there).square().mean().sqrt() > 0.3
    assert empty.std(0).mean() > 0.01


def test_it_stays_frozen_in_eval_mode(golden_backbone, read):
    frames = read("deltatok_released_io")["frames"][:, 0]
    before = golden_backbone.patch_tokens(frames)
    torch.nn.ModuleDict({"backbone": golden_backbone}).train()
    assert not golden_backbone.training
    assert not golden_backbone.model.training
    assert torch.equal(golden_backbone.patch_tokens(frames), before)
    assert not any(parameter.requires_grad for parameter in golden_backbone.parameters())


def test_a_directory_needs_no_network_and_says_nothing(golden, monkeypatch, capfd):
    def refuse(*_args, **_kwargs):
        raise AssertionError("a directory must not be looked up")

    monkeypatch.setattr(huggingface_hub.HfApi, "resolve_revision", refuse)
    capfd.readouterr()
    assert load_backbone(str(golden / "tiny" / "backbone")).id == "backbone"
    assert capfd.readouterr() == ("", "")


class _Response:
    """As much of an HTTP response as the hub's errors look at."""

    headers: Mapping[str, str] = MappingProxyType({})
    request = None


def test_gated_weights_say_what_to_do(monkeypatch):
    def gated(*_args, **_kwargs):
        raise GatedRepoError("restricted", response=_Response())

    monkeypatch.setattr(huggingface_hub.HfApi, "resolve_revision", gated)
    with pytest.raises(CheckpointError) as caught:
        load_backbone("facebook/dinov3-vitb16-pretrain-lvd1689m")
    for word in (
        "facebook/dinov3-vitb16-pretrain-lvd1689m",
        "accept its licence",
        "hf auth login",
        "directory",
    ):
        assert word in str(caught.value)


def test_an_unreachable_hub_says_what_to_do(monkeypatch):
    def offline(*_args, **_kwargs):
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(huggingface_hub.HfApi, "resolve_revision", offline)
    with pytest.raises(CheckpointError, match=r"some/vit is not a directory here .*no connection.*'tiny'"):
        load_backbone("some/vit")


def test_a_hub_id_is_read_from_its_snapshot(monkeypatch, vit_folder):
    commit = ResolvedRevision("0" * 40)
    monkeypatch.setattr(huggingface_hub.HfApi, "resolve_revision", lambda *_args, **_kwargs: commit)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_args, **_kwargs: str(vit_folder))
    assert load_backbone("some/vit").id == "some/vit"


def test_a_path_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="neither a directory nor a name on the Hugging Face hub"):
        load_backbone(str(tmp_path / "nowhere"))


def test_incomplete_weights_are_refused(vit_folder):
    config = json.loads((vit_folder / "config.json").read_text())
    (vit_folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
    with pytest.raises(CheckpointError, match=r"lacks \d+ weights of a ViTModel, the first is .*layers?.1"):
        load_backbone(str(vit_folder))


def test_weights_of_another_shape_are_refused(vit_folder):
    config = json.loads((vit_folder / "config.json").read_text())
    (vit_folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 64}))
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_backbone(str(vit_folder))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
@pytest.mark.parametrize("damage", ["cut", "empty", "gone"])
def test_damaged_directories_are_refused(vit_folder, name, damage):
    path = vit_folder / name
    content = path.read_bytes()
    path.unlink() if damage == "gone" else path.write_bytes(content[: len(content) // 2 * (damage == "cut")])
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_backbone(str(vit_folder))


def test_models_without_patch_tokens_are_refused(tmp_path):
    text = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    transformers.BertModel(transformers.BertConfig(**text, vocab_size=50)).save_pretrained(tmp_path)
    with pytest.raises(
        CheckpointError, match="is a BertModel, which does not turn an image into patch tokens"
    ):
        load_backbone(str(tmp_path))


def test_models_that_drop_patches_are_refused(tmp_path):
    _save(tmp_path, "ViTMAEModel", "ViTMAEConfig", {"mask_ratio": 0.5})
    with pytest.raises(MismatchError, match="tokens for 2 x 2 patches"):
        load_backbone(str(tmp_path)).patch_tokens(_frames(1, 3, 32, 32))


def test_image_sizes_between_patches_are_refused(golden_backbone):
    with pytest.raises(
        MismatchError, match=r"70 x 70 is not a multiple of the patch size 16 .*: take for example 64"
    ):
        golden_backbone.grid(70)
