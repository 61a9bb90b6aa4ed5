"""Code outside of the package, by its Python path ``package.module:name``. It is imported only when a user names it."""

import re
from importlib import import_module
from pathlib import Path
from typing import Any

from deltacache.schemas.errors import DeltacacheError

_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


def is_python_path(text: str) -> bool:
    """Whether ``text`` is such a path, and no folder."""
    return _PATH.fullmatch(text) is not None and not Path(text).exists()


def imported(path: str, what: str) -> Any:
    """What ``path`` names.

    Args:
        what: it is to be, for messages.

    Raises:
        DeltacacheError: the module cannot be imported, or has nothing of that name.
    """
    module, _, name = path.partition(":")
    try:
        return getattr(import_module(module), name)
    except ImportError as error:
        raise DeltacacheError(
            f"{what} {path}: module {module} cannot be imported ({error}): install its package, or put its folder on "
            "PYTHONPATH, here and on all nodes"
        ) from error
    except AttributeError as error:
        raise DeltacacheError(f"{what} {path}: {error}; give package.module:name") from error
