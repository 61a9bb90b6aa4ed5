"""Tokenizer and world models in bfloat16: what autocast gives, to the bit, and float32 where nothing else is asked."""

import pytest
import torch
from torch import Tensor, nn

from deltacache.models.deltatok import DeltaTok
from deltacache.models.devices import InPrecision, allow_tf32, choose_device
from deltacache.models.worlds import architectures, world_class
from deltacache.schemas.errors import DeltacacheError

GRID, HIDDEN, CPU = (2, 3), 48, torch.device("cpu")


def tokenizer() -> DeltaTok:
    torch.manual_seed(0)
    return DeltaTok(HIDDEN, 4, 2, 2, layer_scale_init=0.5).eval().requires_grad_(False)


def reconstructed(model: InPrecision) -> Tensor:
    assert isinstance(model, DeltaTok)
    clip = torch.randn(2, 4, 6, HIDDEN, generator=torch.Generator().manual_seed(1))
    black = torch.zeros(6, HIDDEN)
    parallel = model.reconstruct_parallel(clip, black, GRID, 2)
    return torch.cat((parallel, model.reconstruct_closed_loop(clip, black, GRID, 2)))


def world(architecture: str) -> InPrecision:
    torch.manual_seed(0)
    learned = architecture.startswith("foresight")
    query = {"query": "learned"} if learned else {"query": "noise", "layer_scale_init": 0.5}
    model = world_class(architecture)(HIDDEN, 4, 2, **query)  # pyright: ignore[reportCallIssue]
    for weight in model.parameters():  # some begin as zeros, and would hide what the products give
        nn.init.normal_(weight, std=0.2)
    return model.eval().requires_grad_(False)


def futures(model: InPrecision) -> Tensor:
    assert not isinstance(model, DeltaTok)
    generator = torch.Generator().manual_seed(1)
    tokens = (4, HIDDEN) if model.trains_on == "deltas" else (4, 6, HIDDEN)
    context = torch.randn(2, *tokens, generator=generator)
    noise = model.draw_noise((2, 3, 2, HIDDEN), generator) if model.stochastic else None
    assert noise is None or noise.dtype == torch.float32
    return model.rollout(context, torch.arange(6.0).expand(2, -1), noise, grid=GRID)


CASES = {"tokenizer": (tokenizer, reconstructed)} | {
    name: (lambda name=name: world(name), futures) for name in architectures()
}


@pytest.mark.parametrize("name", CASES)
def test_bfloat16_is_autocast_to_the_bit_and_its_results_are_float32(name: str) -> None:
    build, run = CASES[name]
    exact = run(build())
    assert torch.equal(run(build().to_precision("float32")), exact)
    fast = run(build().to_precision("bfloat16_autocast"))
    assert fast.dtype == torch.float32
    error = (fast - exact).norm() / exact.norm()
    assert 1e-5 < error < 3e-2
    with torch.autocast("cpu", torch.bfloat16):  # weights in float32, as in the trainers
        assert torch.equal(run(build().to_precision("float32")), exact)
        # Frame after frame as a rollout does: what it gives is float32 in between as well.
        if isinstance(build(), DeltaTok):
            return
        assert torch.equal(run(build()).float(), fast)


def test_a_model_that_was_given_no_precision_computes_in_that_of_its_caller() -> None:
    model, frame = tokenizer(), torch.randn(1, 6, HIDDEN)
    exact = model.encode(frame, frame, GRID)
    with torch.autocast("cpu", torch.bfloat16):
        assert not torch.equal(model.encode(frame, frame, GRID), exact)
    with pytest.raises(ValueError, match="bfloat16 throughout is not computed"):
        model.to_precision("bfloat16")


def test_tf32_is_a_matter_of_cuda_and_of_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    before = products.allow_tf32, convolutions.allow_tf32
    assert before == (False, True), "PyTorch's own defaults: importing the package changes nothing"
    allow_tf32(CPU, True)
    assert (products.allow_tf32, convolutions.allow_tf32) == before
    for allowed in (True, False):
        allow_tf32(torch.device("cuda"), allowed)
        assert (products.allow_tf32, convolutions.allow_tf32) == (allowed, allowed)
    products.allow_tf32, convolutions.allow_tf32 = before


def test_mps_is_a_device_that_is_not_chosen_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert choose_device("mps").type == "mps"
    assert choose_device("auto").type == "cpu"
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(DeltacacheError, match="'mps' needs a Mac's GPU that PyTorch can use"):
        choose_device("mps")
    with pytest.raises(DeltacacheError, match="give auto, cpu, cuda or mps"):
        choose_device("mps:1")
