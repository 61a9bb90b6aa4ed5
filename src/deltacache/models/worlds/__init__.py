"""World models, one file each; the file's name is what ``model.architecture`` of a preset says."""

import importlib
import inspect
import pkgutil

from deltacache.models.world_model import WorldModel
from deltacache.schemas.errors import DeltacacheError


def architectures() -> list[str]:
    """Names of all architectures."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def world_class(architecture: str) -> type[WorldModel]:
    """The world model in the file of that name.

    Raises:
        DeltacacheError: there is none.
    """
    if architecture not in architectures():
        raise DeltacacheError(
            f"architecture {architecture!r} is not a world model: give one of {', '.join(architectures())}"
        )
    module = importlib.import_module(f"{__name__}.{architecture}")
    found = [
        each
        for _, each in inspect.getmembers(module, inspect.isclass)
        if issubclass(each, WorldModel)
        and each.__module__ == module.__name__
        and not inspect.isabstract(each)
    ]
    if len(found) != 1:
        raise DeltacacheError(
            f"{module.__file__} defines {len(found)} world models: a file of models/worlds holds one subclass of "
            "WorldModel with all its methods"
        )
    return found[0]


def architecture_of(model: WorldModel) -> str:
    """The name under which ``world_class`` finds the class of ``model``."""
    return type(model).__module__.rpartition(".")[2]
