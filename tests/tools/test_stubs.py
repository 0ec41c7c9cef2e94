"""The stubs of the extensions, by which calls into them are checked, name what is there."""

import ast
import re
from pathlib import Path

import pytest

import lora_kernels


def stubbed(body):
    """Each name that statements of a stub define, with the names of a function's parameters, None for one that has no
    name to callers; with the names in a class; or with None."""
    found = {}
    for node in body:
        if isinstance(node, ast.AnnAssign):
            found[node.target.id] = None
        elif isinstance(node, ast.ClassDef):
            found[node.name] = stubbed(node.body)
        elif isinstance(node, ast.FunctionDef):
            is_property = any(ast.unparse(each) == "property" for each in node.decorator_list)
            unnamed, named = node.args.posonlyargs, node.args.args + node.args.kwonlyargs
            parameters = [each for each in unnamed + named if each.arg != "self"]
            names = [None if each in unnamed else each.arg for each in parameters]
            found[node.name] = None if is_property else names
        elif isinstance(node, ast.ImportFrom) and node.names[0].name == "*":
            found |= stub(node.module)
    return found


def stub(module):
    path = Path(lora_kernels.__file__).parent / f"{module.rpartition('.')[2]}.pyi"
    return stubbed(ast.parse(path.read_text(encoding="utf-8")).body)


def defined(owner):
    """As `stubbed`, of a module or a class of an extension; pybind11 writes a function's signature in its docstring."""
    found = {}
    for name, value in vars(owner).items():
        signature = (getattr(owner, name).__doc__ or "").partition("\n")[0]
        if name.startswith("_") and not signature.startswith("__init__(self: "):
            continue
        if isinstance(value, type):
            found[name] = defined(value)
        elif isinstance(value, (int, property)):
            found[name] = None
        else:
            names = re.findall(r"(\w+): ", signature)
            found[name] = [None if re.fullmatch(r"arg\d+", each) else each for each in names if each != "self"]
    return found


@pytest.mark.parametrize("name", ["_C", "_cuda", "_simt"])
def test_stub_names_what_the_extension_has(name):
    module, expected = pytest.importorskip(f"lora_kernels.{name}"), stub(name)
    if name == "_simt":
        del expected["device_error"]
    assert defined(module) == expected
