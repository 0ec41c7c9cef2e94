"""What NVIDIA's driver is asked to launch, without a GPU: run as a script, over tools/fake_cuda.py.

Each call of the backend is made three times: Triton compiles and launches, Triton's launcher is given what was kept,
the extension launches what was kept. The driver must get the same each time, byte for byte.
"""

import contextlib
import struct
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import triton
import triton.language as tl

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
import fake_cuda

device = fake_cuda.Device()
from lora_kernels._C import TritonLaunches  # noqa: E402
from lora_kernels.backends.triton import common, configs, lora_linear, nf4  # noqa: E402
from lora_kernels.reference import quantize_nf4  # noqa: E402
from lora_kernels.types import AdapterNeeds, Dropout, Layers, Needs, Projection  # noqa: E402

KERNELS = {"_h_kernel", "_gemm_kernel", "_tma_gemm_kernel", "_dh_dlora_b_kernel", "_reduce_kernel", "_dlora_a_kernel",
           "_column_scale_bwd_kernel", "_dequantize_kernel"}  # fmt: skip

# So that these small products are many blocks, and their tiles fetched by the copy engine.
configs._FULL = 1
lora_linear._multiprocessors = lambda index: 2
# Room for every tensor, so that each call has the same addresses.
pool = torch.zeros(1 << 26, dtype=torch.uint8)
offset = 0


def empty(shape, dtype=torch.float32, device=None):
    """In the place of torch.empty: the next tensor of the pool."""
    global offset
    size = torch.Size(shape).numel() * dtype.itemsize
    tensor = pool[offset : offset + size].view(dtype).view(shape)
    offset += -(-size // 64) * 64
    return tensor


def cat(tensors):
    """In the place of torch.cat."""
    rows = sum(len(tensor) for tensor in tensors)
    return original_cat(tensors, out=empty((rows, *tensors[0].shape[1:]), tensors[0].dtype))


original_cat = torch.cat


class Driver:
    """What launches past Triton, counting; nothing where it is not to be used."""

    def __init__(self):
        self.used, self.count, self.launches = True, 0, TritonLaunches(fake_cuda.LIBRARY)

    def launch(self, *args):
        done = self.used and self.launches.launch(*args)
        self.count += done
        return done

    def keep(self, *args, **told):
        self.launches.keep(*args, **told)


driver, launched = Driver(), []
device.watch(launched.append)


def init(self, name, t):
    self.index, self.family, self.device, self.stream, self.driver = 0, "sm90", contextlib.nullcontext(), 7, driver


assert isinstance(common._driver(), TritonLaunches)
common.Launcher.__init__ = init
common._driver = lambda: driver


def once(run):
    """The launches of run(), which allocates with `empty` alone."""
    global offset
    offset, driver.count = 1 << 25, 0
    launched.clear()
    run()
    return list(launched)


def compare(run):
    """The launches of run() by Triton; those of our ways must be the same."""
    global driver
    common._compiled.clear()
    driver = Driver()
    theirs, kept = once(run), len(common._compiled)
    driver.used = False
    ours = once(run)
    assert driver.count == 0 and ours == theirs, "the kept kernel by Triton's launcher"
    driver.used = True
    past = once(run)
    assert [launch.name for launch in past] == [launch.name for launch in theirs]
    for launch, expected in zip(past, theirs, strict=True):
        assert launch == expected, f"{launch}\n{expected}"
    assert driver.count == len(theirs) > 0 and len(common._compiled) == kept
    return theirs


def projection(x, out, rank=16, bias=False, nf4=0, conv1d=False, **other):
    columns = x.shape[1]
    weight = empty((columns, out), x.dtype).T if conv1d else empty((out, columns), x.dtype)
    if nf4:
        weight = quantize_nf4(weight, nf4, double_quant=True)
    made = empty((out,), x.dtype) if bias else None
    return Projection(weight, empty((rank, columns)), empty((out, rank)), 2.0, made, **other)


def run_layers(x, layers, dropout_p, bias_of_scale=None):
    """A function that makes all launches of a layer, or of a group of layers."""
    hs = [empty((len(x), len(layer.lora_a))) for layer in layers]
    dropout = Dropout(dropout_p, empty((2,), torch.int64)) if dropout_p else None
    needs = Needs(True, tuple(AdapterNeeds(True, True, layer.lora_e is not None) for layer in layers))
    dys = [empty((len(x), layer.lora_b.shape[0]), x.dtype) for layer in layers]

    def run():
        lora_linear.lora_linear_fwd(x, Layers(layers), dropout)
        lora_linear.lora_linear_bwd(dys, x, hs, Layers(layers), dropout, needs)
        for dy, layer in zip(dys, layers, strict=True):
            if layer.column_scale is not None:
                lora_linear.column_scale_bwd(dy, dy, layer.bias, layer.column_scale)

    return run


@triton.jit
def _numbers_kernel(x_ptr, none_ptr, small, large, negative, one, real, BLOCK: tl.constexpr):
    if none_ptr is None:
        tl.store(x_ptr + tl.arange(0, BLOCK), real * one + small + large + negative)


def check_numbers():
    x = empty((64,))

    def run(large=1 << 40, grid=(3, 2, 1)):
        args = (x, None, 48, large, -(1 << 33) - 1, 1, 0.1)
        common.Launcher("x", x).launch(_numbers_kernel, grid, args, {"BLOCK": 32, "num_warps": 2})

    (launch,) = compare(run)
    assert launch.numbers == (3, 2, 1, 64, 1, 1, 0, 7, 0), launch
    values = struct.unpack("<QiqqfQQ", b"".join(launch.arguments))
    assert values[:4] == (x.data_ptr(), 48, 1 << 40, -(1 << 33) - 1) and values[5:] == (0, 0), values
    assert struct.pack("<f", values[4]) == struct.pack("<f", 0.1)
    # Nothing to do is no launch, and no error.
    launched.clear()
    run(grid=(0, 2, 1))
    assert not launched and driver.count == 2
    # What Triton takes and we don't know is Triton's.
    driver.count = 0
    run(large=1 << 63)
    assert launched and not driver.count
    device.fail(701)
    try:
        run()
    except RuntimeError as error:
        assert str(error) == "cuLaunchKernelEx: made up (701)", error
    else:
        raise AssertionError("a launch that fails must raise")
    device.fail(0)


def check_what_is_left_to_triton():
    """What a launch may need and the extension doesn't know is never guessed."""
    global driver
    common._compiled.clear()
    driver = Driver()
    x = empty((64,))
    args = (x, None, 48, 1 << 40, -(1 << 33) - 1, 1, 0.1)
    common.Launcher("x", x).launch(_numbers_kernel, (1, 1, 1), args, {"BLOCK": 32, "num_warps": 2})
    ((compiled, _),) = common._compiled.values()

    def described(asm=compiled.asm, kinds=None, **changes):
        changed = SimpleNamespace(
            metadata=compiled.metadata._replace(**changes), src=compiled.src, asm=asm, function=compiled.function
        )
        if kinds:
            changed.src = SimpleNamespace(signature=compiled.src.signature | kinds)
        return common._described(_numbers_kernel, changed, args)

    assert described()["arguments"] == ["value", None, "value", "value", "value", None, "value"]
    for change in (
        {"num_ctas": 2},
        {"launch_cooperative_grid": True},
        {"global_scratch_size": 8},
        {"profile_scratch_size": 8},
        {"shared": (228 << 10) + 1},
        {"asm": {}},
        {"kinds": {"small": "i64"}},
        {"kinds": {"small": "fp64"}},
        {"kinds": {"one": "i32"}},
        {"asm": {"ptx": compiled.asm["ptx"].replace(".param .f32", ".param .f64", 1)}},
    ):
        assert described(**change) is None, change
    assert not common._watched()
    triton.knobs.runtime.launch_enter_hook.add(print)
    assert common._watched()
    triton.knobs.runtime.launch_enter_hook.remove(print)
    try:
        TritonLaunches("no-such-library.so")
    except RuntimeError as error:
        assert "no-such-library.so" in str(error)
    else:
        raise AssertionError("a driver that isn't there must raise")


def check_the_code_changes():
    """What changes the code must not find the old one: a number that is 1 or that 16 divides, an address."""
    rows = empty((512, 128), torch.bfloat16)
    layer = projection(rows, 256)
    common._compiled.clear()
    once(run_layers(rows[:48], [layer], 0.1))
    kept = len(common._compiled)
    once(run_layers(rows[:64], [layer], 0.1))
    assert len(common._compiled) == kept, "16 divides both"
    aligned = once(run_layers(rows[:50], [layer], 0.1))
    assert len(common._compiled) > kept
    elsewhere = empty((50 * 128 + 1,), torch.bfloat16)[1:].view(50, 128)
    elsewhere = once(run_layers(elsewhere, [layer], 0.1))
    handles = [{launch.name: launch.function for launch in launches} for launches in (aligned, elsewhere)]
    assert handles[0]["_h_kernel"] != handles[1]["_h_kernel"], "for an x that starts elsewhere"
    assert handles[0]["_reduce_kernel"] == handles[1]["_reduce_kernel"]


def main():
    # Made once, outside of the pool.
    nf4.tables(pool.device)
    torch.empty, torch.cat = empty, cat
    check_numbers()
    check_what_is_left_to_triton()
    seen = []
    for dtype, rows, dropout_p, options in (
        (torch.bfloat16, 1, 0.1, {}),
        (torch.bfloat16, 40, 0.1, {"bias": True}),
        (torch.bfloat16, 512, 0.1, {}),
        (torch.bfloat16, 512, 0.0, {"conv1d": True, "lora_e": empty((16,))}),
        (torch.float16, 512, 0.0, {"bias": True, "column_scale": empty((256,))}),
        (torch.float32, 40, 0.1, {"rank": 5}),
        (torch.bfloat16, 1, 0.1, {"nf4": 64}),
        (torch.bfloat16, 40, 0.1, {"nf4": 64}),
        (torch.bfloat16, 512, 0.1, {"nf4": 64}),
    ):
        x = empty((rows, 128), dtype)
        seen += compare(run_layers(x, [projection(x, 256, **options)], dropout_p))
    x = empty((512, 128), torch.bfloat16)
    seen += compare(run_layers(x, [projection(x, out) for out in (256, 128, 64)], 0.1))
    # A sum over so many columns is made in parts.
    x = empty((4, 4096), torch.bfloat16)
    seen += compare(run_layers(x, [projection(x, 64)], 0.1))
    assert {launch.name for launch in seen} == KERNELS, sorted({launch.name for launch in seen})
    # The attribute of launches that overlap with the one before.
    assert any(launch.numbers[-2:] == (6, 1) for launch in seen) and any(len(launch.numbers) == 9 for launch in seen)
    assert any(len(argument) == 128 for launch in seen for argument in launch.arguments), "descriptors"
    check_the_code_changes()
    print("the same launches")


if __name__ == "__main__":
    main()
