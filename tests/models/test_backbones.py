"""Every family of encoders against its own model of transformers, called by hand, one image at a time."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from deltacache.models.backbone import IMAGENET, Backbone, load_backbone
from deltacache.models.deltatok import DeltaTok
from deltacache.models.encoders import flattened
from deltacache.models.worlds.deltaworld import DeltaWorld
from deltacache.schemas.errors import MismatchError
from drawn_encoders import FAMILIES, HALF, TEXT_TOWER, by_hand, frames, normalised

WIDTH = 48
TRAINED, OTHERS = 4, ((4, 4), (5, 5), (3, 3), (4, 6), (6, 2))
"""Sides in patches: what positions are learned for, and what images have. With 14-px patches: 56, 70, 42."""
PUBLISHED = {  # width and heads of the checkpoints, here with one layer
    "ViT-S": ("dinov3", 384, 6),
    "ViT-B": ("dinov3", 768, 12),
    "ViT-L": ("dinov3", 1024, 16),
    "ViT-H+": ("dinov3_hplus", 1280, 20),
    "DINOv2 ViT-B": ("dinov2_registers", 768, 12),
    "So400m": ("siglip2_fixed14", 1152, 16),
    "NaFlex B": ("siglip2_naflex", 768, 12),
    "V-JEPA 2 ViT-g": ("vjepa2", 1408, 22),
}


@pytest.fixture(scope="module", params=list(FAMILIES))
def encoder(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, torch.nn.Module, Backbone]:
    """A family, its model, and the backbone that was read from the model's folder."""
    folder, family = tmp_path_factory.mktemp("encoder"), FAMILIES[request.param]
    model = family.save(folder, WIDTH, TRAINED * family.patch)
    return request.param, model, load_backbone(str(folder))


@pytest.mark.parametrize(("rows", "columns"), OTHERS)
def test_patch_tokens_are_those_of_the_model_called_by_hand(encoder, rows: int, columns: int) -> None:
    family, model, backbone = encoder
    patch = FAMILIES[family].patch
    images = frames(2, rows * patch, columns * patch)
    tokens = backbone.patch_tokens(images)
    assert tokens.shape == (2, rows * columns, WIDTH)
    torch.testing.assert_close(tokens, by_hand(family, model, images), atol=2e-5, rtol=2e-5)


def test_a_frame_has_the_same_tokens_whatever_is_beside_it(encoder) -> None:
    family, _, backbone = encoder
    images = frames(3, *[TRAINED * FAMILIES[family].patch] * 2)
    images[2] = images[0]
    together = backbone.patch_tokens(images)
    assert torch.equal(together[0], together[2])
    beside_others = backbone.patch_tokens(torch.stack([images[0], *frames(2, *images.shape[2:], seed=7)]))
    assert torch.equal(together[0], beside_others[0])
    torch.testing.assert_close(backbone.patch_tokens(images[:1])[0], together[0], atol=2e-5, rtol=2e-5)


def test_a_patch_says_what_it_shows_and_where(encoder) -> None:
    """What changes in one patch changes its own token most; the same content elsewhere gives another token."""
    family, _, backbone = encoder
    patch = FAMILIES[family].patch
    images = torch.full((2, 3, 3 * patch, 4 * patch), 90, dtype=torch.uint8)
    images[1, :, patch : 2 * patch, 2 * patch : 3 * patch] = frames(1, patch, patch)[0]
    plain, changed = backbone.patch_tokens(images)
    assert (changed - plain).square().sum(-1).argmax() == 6
    assert (changed[5] - changed[7]).abs().max() > 1e-4  # equal content on both sides of the change


def test_what_is_known_of_an_encoder(encoder, tmp_path: Path) -> None:
    family, model, backbone = encoder
    patch = FAMILIES[family].patch
    assert (backbone.patch_size, backbone.hidden_size, backbone.grid(5 * patch)) == (patch, WIDTH, (5, 5))
    assert (backbone.image_mean, backbone.image_std) == (HALF if "siglip" in family else IMAGENET)
    model.save_pretrained(tmp_path)
    assert load_backbone(str(tmp_path)).weights_sha256 == backbone.weights_sha256
    assert backbone.black_patch_tokens(4 * patch).shape == (16, WIDTH)
    with pytest.raises(MismatchError, match=f"not a multiple of the patch size {patch}"):
        backbone.grid(4 * patch + 2)


def test_bfloat16_is_close_to_float32(encoder, tmp_path: Path) -> None:
    family, model, backbone = encoder
    model.save_pretrained(tmp_path)
    images = frames(2, *[5 * FAMILIES[family].patch] * 2)
    exact, rough = (
        backbone.patch_tokens(images),
        load_backbone(str(tmp_path), "bfloat16_autocast").patch_tokens(images),
    )
    assert rough.dtype == torch.float32
    assert 0 < (rough - exact).square().mean().sqrt() < 0.1 * exact.std()


def test_bfloat16_leaves_the_residual_stream_and_the_norms_in_float32(encoder, tmp_path: Path) -> None:
    family, model, _ = encoder
    model.save_pretrained(tmp_path)
    backbone = load_backbone(str(tmp_path), "bfloat16_autocast")
    seen: dict[str, list[torch.dtype]] = {"block": [], "norm": [], "product": []}
    for part in backbone.model.modules():
        block = isinstance(part, torch.nn.ModuleList) and len(part) == model.config.num_hidden_layers
        for kind, heard in (
            *(("block", each) for each in (part if block else ())),
            *(("norm", part) for _ in range(isinstance(part, torch.nn.LayerNorm))),
            *(("product", part) for _ in range(isinstance(part, torch.nn.Linear))),
        ):
            heard.register_forward_hook(
                lambda _, given, made, kind=kind: seen[kind].append(
                    (made[0] if isinstance(made, tuple) else made).dtype
                )
            )
    backbone.patch_tokens(frames(1, *[3 * FAMILIES[family].patch] * 2))
    assert {kind: set(dtypes) for kind, dtypes in seen.items()} == {
        "block": {torch.float32},
        "norm": {torch.float32},
        "product": {torch.bfloat16},
    }


def test_the_last_block_after_the_final_norm_is_the_last_hidden_state(encoder, tmp_path: Path) -> None:
    family, model, backbone = encoder
    model.save_pretrained(tmp_path)
    images = frames(2, *[3 * FAMILIES[family].patch] * 2)
    both = load_backbone(str(tmp_path), layers=(0, 1)).patch_tokens(images)
    first, last = both.split(WIDTH, dim=-1)
    torch.testing.assert_close(last, backbone.patch_tokens(images))
    assert (first - last).square().mean() > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_widths_of_the_published_checkpoints(name: str, tmp_path: Path) -> None:
    family, width, heads = PUBLISHED[name]
    settings = {"num_hidden_layers": 1, "num_attention_heads": heads}
    size = 2 * FAMILIES[family].patch
    model = FAMILIES[family].save(tmp_path, width, size, **settings)
    images = frames(1, size, size)
    tokens = load_backbone(str(tmp_path)).patch_tokens(images)
    torch.testing.assert_close(tokens, by_hand(family, model, images), atol=1e-4, rtol=1e-4)


def test_patches_are_those_of_siglips_own_processor() -> None:
    image = frames(1, 32, 64)[0]
    processor = transformers.Siglip2ImageProcessorPil(patch_size=16, max_num_patches=8)
    prepared = processor(image.permute(1, 2, 0).numpy(), return_tensors="pt")
    patches, grid = flattened(normalised(image, "siglip2")[None], 16)
    assert grid == tuple(prepared["spatial_shapes"][0]) == (2, 4)
    torch.testing.assert_close(patches, prepared["pixel_values"])


@pytest.mark.parametrize("kind", ["Siglip", "Siglip2"])
def test_only_the_image_side_of_siglip_counts(kind: str, tmp_path: Path) -> None:
    """The published SigLIP 2 folders hold both towers; those of one size say they are a SigLIP."""
    family = "siglip2_naflex" if kind == "Siglip2" else "siglip2_fixed16"
    alone = FAMILIES[family].save(tmp_path / "alone", WIDTH, 64)
    config = getattr(transformers, f"{kind}Config")(
        text_config=TEXT_TOWER, vision_config=alone.config.to_dict()
    )
    both = getattr(transformers, f"{kind}Model")(config).eval()
    both.vision_model.load_state_dict(alone.state_dict())
    both.save_pretrained(tmp_path / "both")
    one, two = (load_backbone(str(tmp_path / name)) for name in ("alone", "both"))
    assert one.weights_sha256 == two.weights_sha256
    images = frames(1, 64, 64)
    assert torch.equal(one.patch_tokens(images), two.patch_tokens(images))


def test_a_classifier_on_vjepa2_gives_its_encoder(tmp_path: Path) -> None:
    family = FAMILIES["vjepa2"]
    alone = family.save(tmp_path / "alone", WIDTH, 64)
    classifier = transformers.VJEPA2ForVideoClassification(alone.config).eval()
    classifier.vjepa2.load_state_dict(alone.state_dict())
    classifier.save_pretrained(tmp_path / "classifier")
    one, two = (load_backbone(str(tmp_path / name)) for name in ("alone", "classifier"))
    assert one.weights_sha256 == two.weights_sha256


@pytest.mark.parametrize(
    ("family", "unused"),
    [("vjepa2", "predictor."), ("siglip2_fixed16", "head."), ("siglip2_naflex", "head.")],
)
def test_predictor_and_pooling_do_not_count(family: str, unused: str, tmp_path: Path) -> None:
    FAMILIES[family].save(tmp_path, WIDTH, 64)
    before = load_backbone(str(tmp_path)).weights_sha256
    path = tmp_path / "model.safetensors"
    state = load_file(path)
    needed = {name: part for name, part in state.items() if not name.startswith(unused)}
    assert len(needed) < len(state)
    save_file(needed, path, {"format": "pt"})
    assert load_backbone(str(tmp_path)).weights_sha256 == before


def test_normalisation_as_processors_write_it(tmp_path: Path) -> None:
    FAMILIES["siglip2_fixed16"].save(tmp_path, WIDTH, 64)
    assert load_backbone(str(tmp_path)).image_std == HALF[1]
    colours = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": colours}))
    assert load_backbone(str(tmp_path)).image_mean == (0.1, 0.2, 0.3)
    (tmp_path / "processor_config.json").write_text(json.dumps({"video_processor": colours}))
    assert load_backbone(str(tmp_path)).image_std == (0.4, 0.5, 0.6)
    (tmp_path / "processor_config.json").write_text(json.dumps({"processor_class": "SiglipProcessor"}))
    assert load_backbone(str(tmp_path)).image_std == HALF[1]
    (tmp_path / "video_preprocessor_config.json").write_text(json.dumps({"image_mean": [0.7, 0.8, 0.9]}))
    backbone = load_backbone(str(tmp_path))
    assert (backbone.image_mean, backbone.image_std) == ((0.7, 0.8, 0.9), HALF[1])


def test_the_heads_that_the_docs_name_suit_their_widths() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "backbones.md").read_text()
    rows = [
        line.split("|")[2:-1] for line in page.splitlines() if line.startswith(("  | width", "  | `--heads`"))
    ]
    suited = {int(width): int(heads) for width, heads in zip(*rows, strict=True)}
    assert {384, 768, 1024, 1280} <= suited.keys()
    with torch.device("meta"):
        for width, heads in suited.items():
            assert width == 64 * heads
            DeltaTok(width, heads, 1, 1)
            DeltaWorld(width, heads, 1)
