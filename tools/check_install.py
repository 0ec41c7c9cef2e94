"""Whether an installed lora-kernels works: the CPU kernels against float64, and what each backend says of itself."""

import platform
import sys
from pathlib import Path
from typing import Any

import torch

import lora_kernels
from lora_kernels import _C
from lora_kernels.reference import lora_linear_ref


def check_lora_linear() -> None:
    M, N, K, R = 33, 48, 65, 8
    tensors = [torch.randn(*shape, requires_grad=True) for shape in ((M, K), (N, K), (R, K), (N, R))]
    exact = [t.detach().double().requires_grad_() for t in tensors]
    x, weight, lora_a, lora_b = tensors
    with lora_kernels.use_backend("cpu"):
        y = lora_kernels.lora_linear(x, weight, lora_a, lora_b, 0.5)
        y.square().sum().backward()
    expected = lora_linear_ref(exact[0], exact[1], exact[2], exact[3], 0.5)
    expected.square().sum().backward()
    pairs: list[tuple[Any, Any]] = [(y, expected), *((a.grad, b.grad) for a, b in zip(tensors, exact, strict=True))]
    for ours, theirs in pairs:
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max().item())


def check_nf4() -> None:
    weight = torch.randn(48, 64)
    with lora_kernels.use_backend("cpu"):
        packed = lora_kernels.quantize_nf4(weight)
    with lora_kernels.use_backend("reference"):
        error = (packed.dequantize(torch.float32) - weight).abs().max()
    # Half of the widest gap between two codes, 0.304, times the largest weight.
    assert error <= 0.153 * weight.abs().max(), error


def openmp_runtimes() -> list[str]:
    lines = Path("/proc/self/maps").read_text().splitlines() if sys.platform == "linux" else []
    return sorted({Path(line.split()[-1]).name for line in lines if "gomp" in line})


def main() -> None:
    torch.manual_seed(0)
    check_lora_linear()
    check_nf4()
    print(f"lora-kernels {lora_kernels.__version__}, torch {torch.__version__}, Python {platform.python_version()}")
    print(f"installed in {Path(lora_kernels.__file__).parent}")
    print(f"lora_linear and NF4 on the CPU ({_C.get_isa()}): right")
    print(f"OpenMP runtimes in the process: {', '.join(openmp_runtimes()) or 'unknown'}")
    for name, reason in lora_kernels.available().items():
        print(f"{name}: {reason or 'usable'}")


if __name__ == "__main__":
    main()
