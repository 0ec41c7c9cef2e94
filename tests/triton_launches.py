"""What Triton's launcher is given, without a GPU: run as a script, in a process whose Triton compiles.

The kernels are compiled for one NVIDIA chip, and a driver made up for it loads and launches nothing. A call of the
backend goes Triton's way the first time and ours from then on (`Launcher.launch`): both must give the same arguments.
"""

import contextlib
import zlib

import torch
import triton
from triton.backends.compiler import GPUTarget

launched = []


class Driver:
    class utils:  # noqa: N801
        @staticmethod
        def load_binary(name, kernel, shared, device):
            # The second is the handle by which a kernel is launched: another one for each binary.
            return 1, zlib.crc32(kernel), 32, 0, 1024

        @staticmethod
        def get_device_properties(device):
            return {"max_shared_mem": 232448, "multiprocessor_count": 132}

    class launcher_cls:  # noqa: N801
        def __init__(self, source, metadata):
            self.name = metadata.name

        def __call__(self, *args):
            launched.append((self.name, args))

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 7

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


def describe(value):
    return value.data_ptr() if isinstance(value, torch.Tensor) else value


def main():
    triton.runtime.driver.set_active(Driver())
    from lora_kernels.backends.triton import common, configs, lora_linear
    from lora_kernels.reference import quantize_nf4

    # So that these small products are many blocks, and their tiles fetched by the copy engine.
    configs._FULL = 1

    def init(self, name, t):
        self.index, self.family, self.device, self.stream = 0, "sm90", contextlib.nullcontext(), 7

    common.Launcher.__init__ = init
    lora_linear._multiprocessors = lambda index: 2
    # Room for every result, so that each call has the same addresses.
    pool = torch.empty(1 << 24, dtype=torch.uint8)
    offset = 0

    def empty(shape, dtype=None, device=None):
        nonlocal offset
        size = torch.Size(shape).numel() * dtype.itemsize
        tensor = pool[offset : offset + size].view(dtype).view(shape)
        offset += -(-size // 64) * 64
        return tensor

    def run(x, weight, offset_of_x=0):
        nonlocal offset
        offset = 0
        launched.clear()
        rng = torch.zeros(2, dtype=torch.int64)
        h = torch.zeros(len(x), 16)
        lora_linear.lora_linear_fwd(x, weight, lora_a, lora_b, 2.0, None, None, 0.1, rng)
        lora_linear.lora_linear_bwd(dy[: len(x)], x, h, weight, lora_a, lora_b, 2.0, None, 0.1, rng, (True,) * 4)
        # The small tensors made above lie elsewhere in each call.
        own = (rng.data_ptr(), h.data_ptr())
        return [
            (
                name,
                [describe(arg) for arg in args[:5]] + [describe(arg) for arg in args[9:] if describe(arg) not in own],
            )
            for name, args in launched
        ]

    lora_linear.torch.empty, original = empty, torch.empty
    try:
        dense = torch.zeros(256, 128).bfloat16()
        lora_a, lora_b, dy = torch.zeros(16, 128), torch.zeros(256, 16), torch.zeros(512, 256).bfloat16()
        weights = {"dense": dense, "nf4": quantize_nf4(dense, 64, False)}
        rows = torch.zeros(512, 128).bfloat16()
        for kind, weight in weights.items():
            for count in (1, 40, 512):
                common._compiled.clear()
                theirs = run(rows[:count], weight)
                kept = len(common._compiled)
                ours = run(rows[:count], weight)
                assert kept == len(common._compiled) > 0
                assert [name for name, _ in theirs] == [name for name, _ in ours] and len(theirs) >= 6
                for (name, a), (_, b) in zip(theirs, ours, strict=True):
                    assert [str(value) for value in a] == [str(value) for value in b], (kind, count, name)
        # What changes the code must not find the old one: a number that is 1 or that 16 divides, an address.
        common._compiled.clear()
        run(rows[:48], dense)
        kept = len(common._compiled)
        run(rows[:64], dense)
        assert len(common._compiled) == kept, "16 divides both"
        aligned = run(rows[:50], dense)
        assert len(common._compiled) > kept
        elsewhere = run(torch.zeros(50 * 128 + 1).bfloat16()[1:].view(50, 128), dense)
        handles = [{name: args[4] for name, args in launches} for launches in (aligned, elsewhere)]
        assert handles[0]["_h_kernel"] != handles[1]["_h_kernel"], "for an x that starts elsewhere"
        assert handles[0]["_reduce_kernel"] == handles[1]["_reduce_kernel"]
    finally:
        lora_linear.torch.empty = original
    print("the same arguments")


if __name__ == "__main__":
    main()
