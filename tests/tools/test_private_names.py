"""A name that begins with an underscore is used in its own module only."""

import ast
from pathlib import Path

import lora_kernels

PACKAGE = Path(lora_kernels.__file__).parent
EXTENSIONS = {"lora_kernels._C", "lora_kernels._cuda", "lora_kernels._simt"}
NAMED_TUPLE = {"_asdict", "_fields", "_make", "_replace"}


def is_private(name):
    return name.startswith("_") and not name.startswith("__")


def foreign_private_names(source):
    """The private names of other modules of the package that a module's source imports, or takes as attributes of what
    it imports."""
    found, imported = set(), {}
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.asname or alias.name: alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            found |= {f"{node.module}.{alias.name}" for alias in node.names if is_private(alias.name)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr not in NAMED_TUPLE:
            found.add(f"{imported.get(ast.unparse(node.value), '')}.{node.attr}")
    return {name for name in found if name.startswith("lora_kernels.")} - EXTENSIONS


def test_private_names_stay_in_their_modules():
    found = {
        (path.relative_to(PACKAGE).as_posix(), name)
        for path in PACKAGE.rglob("*.py")
        for name in foreign_private_names(path.read_text(encoding="utf-8"))
    }
    assert found == set()


def test_each_way_to_reach_a_private_name_is_found():
    source = """
import lora_kernels.files
import lora_kernels.lazy as names
from lora_kernels import _C
from lora_kernels.backends import cpu
from lora_kernels.checks import _check as check

lora_kernels.files._a, names._b, cpu._c.d, cpu.e, self._f, cpu.__doc__, cpu._replace
"""
    assert foreign_private_names(source) == {
        "lora_kernels.checks._check",
        "lora_kernels.files._a",
        "lora_kernels.lazy._b",
        "lora_kernels.backends.cpu._c",
    }
