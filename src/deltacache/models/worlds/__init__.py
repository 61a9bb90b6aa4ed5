"""World models, one file each; the file's name is what ``model.architecture`` of a preset says."""

import importlib
import inspect
import pkgutil

from deltacache.models.outside import imported, is_python_path
from deltacache.models.world_model import WorldModel
from deltacache.schemas.errors import DeltacacheError

_NAMED = set[str]()
"""Classes outside of the package that were named to this process."""


def is_known(architecture: str) -> bool:
    """Whether a checkpoint may ask for it: it is in the package, or was named to this process by a user."""
    return not is_python_path(architecture) or architecture in _NAMED


def architectures() -> list[str]:
    """Names of all architectures."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def world_class(architecture: str) -> type[WorldModel]:
    """The world model in the file of that name, or the class that ``package.module:Class`` names, which is imported.

    Raises:
        DeltacacheError: there is none.
    """
    if is_python_path(architecture):
        made = imported(architecture, "architecture")
        if not (inspect.isclass(made) and issubclass(made, WorldModel)) or inspect.isabstract(made):
            raise DeltacacheError(
                f"architecture {architecture} is not a world model: give a subclass of deltacache.WorldModel with all "
                "its methods (docs/worlds.md)"
            )
        _NAMED.add(architecture)
        return made
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
    module, own = type(model).__module__, f"{__name__}."
    return module.removeprefix(own) if module.startswith(own) else f"{module}:{type(model).__qualname__}"
