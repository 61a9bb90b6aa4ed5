"""Outputs of several blocks, against models of transformers that end after those blocks."""

import copy
import threading
from pathlib import Path

import pytest
import torch

from deltacache.models.backbone import IMAGENET, Backbone, load_backbone
from deltacache.models.pca import Moments, principal_components
from deltacache.schemas.errors import MismatchError
from drawn_encoders import FAMILIES, by_hand, frames

WIDTH, BLOCKS = 48, 4


@pytest.fixture(scope="module", params=list(FAMILIES))
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """A family, its model of four blocks, and the folder it was saved to."""
    folder, family = tmp_path_factory.mktemp("encoder"), FAMILIES[request.param]
    model = family.save(folder, WIDTH, 4 * family.patch, num_hidden_layers=BLOCKS)
    return request.param, model, folder


def ended_after(model: torch.nn.Module, block: int) -> torch.nn.Module:
    """The same model without the blocks behind this one; what follows the last block stays."""
    shorter = copy.deepcopy(model)
    lists = [
        part for part in shorter.modules() if isinstance(part, torch.nn.ModuleList) and len(part) == BLOCKS
    ]
    (blocks,) = lists
    del blocks[block + 1 :]
    shorter.config.num_hidden_layers = block + 1
    return shorter


@pytest.mark.parametrize("size", [(4, 4), (3, 5)])
def test_each_part_is_a_shorter_model(saved, size: tuple[int, int]) -> None:
    family, model, folder = saved
    layers = (0, 2, 3)
    images = frames(2, *(side * FAMILIES[family].patch for side in size))
    backbone = load_backbone(str(folder), layers=layers)
    tokens = backbone.patch_tokens(images)
    assert tokens.shape == (2, size[0] * size[1], len(layers) * WIDTH)
    assert backbone.hidden_size == len(layers) * WIDTH
    for place, layer in enumerate(layers):
        part = tokens[..., place * WIDTH : (place + 1) * WIDTH]
        torch.testing.assert_close(
            part, by_hand(family, ended_after(model, layer), images), atol=5e-5, rtol=5e-5
        )


def test_the_last_layer_alone_is_the_last_hidden_state(saved) -> None:
    family, _, folder = saved
    images = frames(1, *[4 * FAMILIES[family].patch] * 2)
    usual, last = load_backbone(str(folder)), load_backbone(str(folder), layers=(BLOCKS - 1,))
    assert torch.equal(usual.patch_tokens(images), last.patch_tokens(images))
    assert usual.weights_sha256 == last.weights_sha256


def test_threads_hear_their_own_forward() -> None:
    backbone = load_backbone("tiny", layers=(0, 1))
    images = [frames(2, 32, 48, seed) for seed in range(6)]
    alone = [backbone.patch_tokens(each) for each in images]
    together: dict[int, list[torch.Tensor]] = {}

    def work(number: int) -> None:
        together[number] = [backbone.patch_tokens(images[number]) for _ in range(10)]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(images))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, expected in enumerate(alone):
        assert all(torch.equal(each, expected) for each in together[number])


@pytest.mark.parametrize("layers", [(2,), (-1,), (1, 0), (0, 0), ()])
def test_layers_that_are_not_there_are_refused(layers: tuple[int, ...]) -> None:
    with pytest.raises(
        MismatchError, match=r"layers .* of tiny: give block numbers from 0 to 1, in increasing order"
    ):
        load_backbone("tiny", layers=layers)


def test_an_encoder_without_a_list_of_blocks_is_refused() -> None:
    model = load_backbone("tiny").model
    model.config.num_hidden_layers = 5
    with pytest.raises(MismatchError, match="has no single list of 5 blocks; leave --layers out"):
        Backbone(model, "odd", IMAGENET, (0,))


def test_bfloat16_is_close(tmp_path: Path) -> None:
    FAMILIES["dinov2_registers"].save(tmp_path, WIDTH, 56, num_hidden_layers=BLOCKS)
    images = frames(2, 28, 56)
    exact, rough = (
        load_backbone(str(tmp_path), kind, (1, 3)).patch_tokens(images)
        for kind in ("float32", "bfloat16_autocast")
    )
    assert rough.dtype == torch.float32
    assert 0 < (rough - exact).square().mean().sqrt() < 0.1 * exact.std()


def test_a_pca_reduces_what_the_layers_give(tmp_path: Path) -> None:
    images = frames(40, 32, 48)
    backbone = load_backbone("tiny", layers=(0, 1))
    joined = backbone.patch_tokens(images)
    made_of = {"weights_sha256": backbone.weights_sha256, "layers": [0, 1]}
    pca = principal_components(Moments.of(joined.flatten(0, 1)), 10, {"backbone": made_of})
    with pytest.raises(
        MismatchError, match="fitted on layers 0,1, 128 wide, but these tokens are the last hidden"
    ):
        load_backbone("tiny").reduce_by(pca, tmp_path)
    backbone.reduce_by(pca, tmp_path)
    assert backbone.hidden_size == 10
    torch.testing.assert_close(backbone.patch_tokens(images), pca.project(joined))
    assert backbone.black_patch_tokens((32, 48)).shape == (6, 10)
