"""Which parameters get weight decay."""

from typing import TypedDict

from torch import nn


class ParameterGroup(TypedDict):
    """What ``torch.optim`` takes as one group."""

    params: list[nn.Parameter]
    weight_decay: float


def decay_groups(module: nn.Module, weight_decay: float) -> list[ParameterGroup]:
    """Decay the weights of linear and convolution layers only: no bias, norm, embedding or LayerScale.

    Parameters keep the order of ``named_parameters``, so that optimizer states of equal models line up;
    frozen ones are left out.
    """
    decayed_names = {
        f"{name}.weight" if name else "weight"
        for name, part in module.named_modules()
        if isinstance(part, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)
    }
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            (decayed if name in decayed_names else others).append(parameter)
    return [
        ParameterGroup(params=decayed, weight_decay=weight_decay),
        ParameterGroup(params=others, weight_decay=0.0),
    ]
