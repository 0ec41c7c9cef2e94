import subprocess
import sys

import pytest
import torch
from torch import nn

from lora_kernels.types import Places, _Places

CHANGES = {
    "nothing": lambda t: None,
    "values": lambda t: t.add_(1),
    "address": lambda t: setattr(t, "data", t.data.clone()),
    "strides": lambda t: setattr(t, "data", t.data.t()),
    "shape": lambda t: setattr(t, "data", t.data[:3]),
    "dtype": lambda t: setattr(t, "data", t.data.view(torch.int32)),
    "need of a gradient": lambda t: t.requires_grad_(),
}


@pytest.mark.parametrize("kind", [_Places, Places], ids=["Python", "extension"])
@pytest.mark.parametrize("change", CHANGES)
def test_what_places_tell_of_a_change(kind, change):
    tensors, x = (nn.Parameter(torch.randn(4, 4), requires_grad=False), None, torch.randn(3)), torch.randn(2, 5, 4)
    places = kind(tensors, x)
    assert places.hold(tensors, x) and places.hold(tensors, None)
    with torch.no_grad():
        CHANGES[change](tensors[0])
    assert places.hold(tensors, x) == places.hold(tensors, None) == (change in ("nothing", "values"))


@pytest.mark.parametrize("kind", [_Places, Places], ids=["Python", "extension"])
def test_what_places_tell_of_other_tensors(kind):
    tensors, x = (torch.randn(4, 4), None), torch.randn(2, 4)
    places = kind(tensors, x)
    assert places.hold(tensors, torch.randn(7, 3, 4))
    for other in (torch.randn(2, 5), torch.randn(2, 4).half(), torch.empty(2, 4, device="meta")):
        assert not places.hold(tensors, other)
    for others in ((tensors[0].clone(), None), (None, tensors[0]), tensors[:1], (*tensors, None)):
        assert not places.hold(others, x)


def test_tensors_are_read_where_torch_has_no_exchange_api(request):
    """As torch before 2.10 hasn't."""
    tests = [__file__, str(request.path.parent / "nn" / "test_nn.py"), "-k", "places or every_change or moved"]
    code = "import sys, torch; del torch.Tensor.__dlpack_c_exchange_api__; import pytest; sys.exit(pytest.main({}))"
    if not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
        pytest.skip("this torch has none")
    command = [sys.executable, "-c", code.format(["-q", "-p", "no:cacheprovider", "-p", "no:xdist", *tests])]
    run = subprocess.run(command, capture_output=True, text=True, cwd=request.config.rootpath, check=False)
    assert run.returncode == 0 and " passed" in run.stdout, run.stdout
