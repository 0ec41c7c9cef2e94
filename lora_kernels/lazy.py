"""Names of a package that are imported on first use: `lora-kernels --help` need not wait for torch (PEP 562)."""

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any


def exports(package: str, home: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of `package`; home: {name: the module that it lives in, one below the package or
    a full name}."""

    def get(name: str) -> Any:
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module = home[name] if home[name].startswith("lora_kernels.") else f"{package}.{home[name]}"
        return getattr(importlib.import_module(module), name)

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *home})

    return get, names
