"""Scoring: ``deltacache.evaluate(out, data, ...)`` calls this package, which is ``deltacache.api.evaluate``."""

import sys
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    """The package is called like the function of the same name: importing a part of it would hide that function."""

    def __call__(self, *arguments: Any, **settings: Any) -> Any:
        from deltacache.api import evaluate

        return evaluate(*arguments, **settings)


sys.modules[__name__].__class__ = _Callable
