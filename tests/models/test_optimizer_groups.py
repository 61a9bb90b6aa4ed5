"""Which parameters get weight decay, as in the released code."""

import json

import pytest
from torch import nn

from deltacache.models.optimizer_groups import decay_groups


@pytest.mark.parametrize("name", ["deltatok", "deltaworld"])
def test_golden_groups(name, golden, golden_tokenizer, golden_world):
    model = golden_tokenizer("released") if name == "deltatok" else golden_world("deltaworld")
    expected = json.loads((golden / "tiny" / "optimizer_groups.json").read_text())[name]
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, others = decay_groups(model, 0.4)
    assert sorted(names[id(parameter)] for parameter in decayed["params"]) == sorted(expected["decay"])
    assert sorted(names[id(parameter)] for parameter in others["params"]) == sorted(expected["no_decay"])
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.4, 0.0)


def test_convolutions_decay_and_frozen_parameters_are_left_out():
    model = nn.ModuleDict({"conv": nn.Conv2d(1, 1, 1), "frozen": nn.Linear(2, 2), "norm": nn.BatchNorm2d(1)})
    model["frozen"].requires_grad_(False)
    decayed, others = decay_groups(model, 0.1)
    assert [id(p) for p in decayed["params"]] == [id(model["conv"].weight)]
    assert [id(p) for p in others["params"]] == [
        id(p) for p in (model["conv"].bias, model["norm"].weight, model["norm"].bias)
    ]
