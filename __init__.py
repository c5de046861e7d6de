"""embershard: recommendation models whose embedding tables are too large for one machine.

Public names are imported on first use, so that `import embershard` is quick and a parameter-server process never loads
torch.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

try:
    __version__ = version("embershard")
except PackageNotFoundError:  # a source tree that is not installed
    __version__ = "0.0.0"

_PUBLIC: dict[str, str] = {}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'embershard' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name], __name__), name)


if TYPE_CHECKING:
    pass
