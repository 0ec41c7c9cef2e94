"""Names of a package that are imported on first use: `lora-kernels --help` need not wait for torch (PEP 562)."""

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any


def exports(package: str, home: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of `package`; home: {name: the module below the package that it lives in}."""

    def get(name: str) -> Any:
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{package}.{home[name]}"), name)

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *home})

    return get, names
