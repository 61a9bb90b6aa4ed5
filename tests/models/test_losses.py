"""Losses against the released code's numbers and at their extremes."""

import torch

from deltacache.models.blocks import log_cosh, smooth_l1


def test_golden_values(read, assert_golden):
    io = read("losses_io")
    assert_golden(log_cosh(io["pred"], io["target"]), io["log_cosh"])
    assert_golden(smooth_l1(io["pred"], io["target"], 0.1), io["smooth_l1"])


def test_smooth_l1_equals_torch_for_other_betas():
    prediction = torch.linspace(-3, 3, 101)
    for beta in (0.1, 0.5, 2.0):
        expected = torch.nn.functional.smooth_l1_loss(
            prediction, torch.zeros(101), reduction="none", beta=beta
        )
        torch.testing.assert_close(smooth_l1(prediction, torch.zeros(()), beta), expected)


def test_log_cosh_neither_overflows_nor_loses_its_gradient():
    error = torch.tensor([-1e4, -1.0, 0.0, 1.0, 1e4], requires_grad=True)
    loss = log_cosh(error, torch.zeros(5))
    assert loss.isfinite().all()
    loss.sum().backward()
    torch.testing.assert_close(error.grad, torch.tanh(error.detach()))
