"""The precision that a trained model computes its results in: exact, or products in bfloat16."""

import functools
from collections.abc import Callable
from typing import Concatenate, ParamSpec, Self, TypeVar

import torch
from torch import Tensor, nn

from deltacache.models.devices import autocast_to
from deltacache.schemas.datasets import Precision

_Model = TypeVar("_Model", bound="InPrecision")
_Given = ParamSpec("_Given")


class InPrecision(nn.Module):
    """A model whose methods marked with ``in_precision`` compute in the precision that ``to_precision`` names.

    Until it has named one they compute in that of their caller, as training under autocast does.
    """

    _products: torch.dtype | None = None
    _precision: Precision | None = None

    def to_precision(self, precision: Precision) -> Self:
        """Have results computed in ``precision`` from now on; they are float32 in any case.

        ``bfloat16_autocast``: products in bfloat16, residual stream and norms in float32. The weights of linear layers
        are rounded once instead of in every pass, which gives the same bits, so the model can be neither trained nor
        saved any more.
        """
        if precision == "bfloat16":
            raise ValueError("bfloat16 throughout is not computed: take bfloat16_autocast or float32")
        self._precision, self._products = precision, None
        if precision == "bfloat16_autocast":
            self._products = torch.bfloat16
            for module in self.modules():
                if isinstance(module, nn.Linear):
                    module.to(torch.bfloat16)
        return self


def in_precision(
    method: Callable[Concatenate[_Model, _Given], Tensor],
) -> Callable[Concatenate[_Model, _Given], Tensor]:
    """Have a method of an ``InPrecision`` model compute in that model's own precision."""

    @functools.wraps(method)
    def run(self: _Model, *args: _Given.args, **kwargs: _Given.kwargs) -> Tensor:
        if self._precision is None:
            return method(self, *args, **kwargs)
        with autocast_to(next(self.parameters()).device.type, self._products):
            return method(self, *args, **kwargs).float()

    return run
