"""The CUDA C++ kernels, on the CPU under the emulator, against float64."""

import pytest
import torch
from lora_cases import (
    RNG,
    SCALING,
    GuardedBuffers,
    LoraCase,
    OneLayer,
    check_group,
    check_low_rank_beside_a_full_weight,
    group_case,
    group_results,
    strided,
)

from lora_kernels import (
    backends,
    lora_linear,
    lora_linear_group,
    reference,
    use_backend,
)
from lora_kernels.backends import cuda
from lora_kernels.backends.cuda.emulated import EmulatedKernels
from lora_kernels.backends.cuda.emulated import backend as cuda_emulated
from lora_kernels.testing import lora_inputs
from lora_kernels.types import AdapterNeeds, Layers, Needs

ONE = OneLayer(cuda_emulated)
pytestmark = pytest.mark.skipif(cuda_emulated.unavailable is not None, reason=str(cuda_emulated.unavailable))

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture
def simt():
    from lora_kernels import _simt

    yield _simt
    _simt.set_schedule("forward")


def aligned_rows(name, t):
    """x and dy as rows, 16 bytes aligned, of a wider tensor."""
    if name not in ("x", "dy"):
        return t
    wide = torch.full((t.shape[0], t.shape[1] + 16), float("nan"), dtype=t.dtype)
    wide[:, 8:-8] = t
    return wide[:, 8:-8]


def padded_weight(name, t):
    """The weight's rows further apart than they are long, by as much as keeps them aligned."""
    if name != "weight":
        return t
    return torch.nn.functional.pad(t, (0, 8), value=float("nan"))[:, :-8]


def unaligned(name, t):
    """An element away from where a 16-byte load may begin."""
    if name not in ("x", "weight"):
        return t
    memory = torch.full((t.numel() + 1,), float("nan"), dtype=t.dtype)
    return memory[1:].view(t.shape).copy_(t)


class Case(LoraCase):
    backend = cuda_emulated

    def __init__(self, *sizes, dtype=BF16, **options):
        super().__init__(*sizes, dtype=dtype, **options)

    def results(self):
        functions = ONE.lora_linear_fwd, ONE.lora_linear_bwd
        return self.run(*functions, scale_bwd=cuda_emulated.column_scale_bwd)


@pytest.mark.parametrize("rng", [(0, 0), (-1, -1), (2**63 - 1, 2**40 + 3), tuple(RNG.tolist())])
def test_mask_is_the_reference_mask_bit_for_bit(rng):
    """Read off h where lora_a selects columns, off dx where only the masked term is left, and off dlora_a."""
    rng, M, K = torch.tensor(rng), 150, 168
    for dropout_p in (0.1, 0.5, 0.99999):
        keep, scale = reference.keep_mask(rng, dropout_p, M, K), reference.dropout_scale(dropout_p)
        ones, zeros = torch.ones(M, K, dtype=BF16), torch.zeros(1, K, dtype=BF16)
        lora_b = torch.ones(1, K, dtype=BF16)
        args = (1.0, None, None, dropout_p, rng)
        _, h = ONE.lora_linear_fwd(ones, zeros, torch.eye(K), lora_b, *args)
        assert torch.equal(h, keep * torch.tensor(scale))

        dy, lora_b, lora_a = torch.eye(M, dtype=BF16), torch.eye(M, dtype=BF16), torch.ones(M, K, dtype=BF16)
        dx, dlora_a, *_ = ONE.lora_linear_bwd(
            dy, ones, torch.zeros(M, M), torch.zeros(M, K, dtype=BF16), lora_a, lora_b, 1.0, None, dropout_p, rng,
            (True, True, False, False),
        )  # fmt: skip
        assert torch.equal(dx != 0, keep) and torch.equal(dlora_a != 0, keep)


@pytest.mark.parametrize("K", [1304, 2051])
@pytest.mark.parametrize("M", [5, 33])
@pytest.mark.parametrize("R", [17, 70])
def test_h_in_parts(monkeypatch, M, K, R):
    """As on a GPU with many multiprocessors: its sum over the columns of x is cut where a block's steps end."""
    case = Case(M, 24, K, R, adapter_dtype=FP32, dropout_p=0.2, bias=True)
    whole = case.check()["h"]
    monkeypatch.setattr(cuda, "_COLUMNS_WORTH_PARTS", 1024)
    monkeypatch.setattr(cuda.Kernels, "_block_target", lambda self, x: 64)
    splits = []
    queue = EmulatedKernels._queue

    def noted(self, on, *launches):
        splits.extend(arguments["splits"] for name, arguments in launches if name in ("lora_few_rows", "lora_gemm"))
        queue(self, on, *launches)

    monkeypatch.setattr(EmulatedKernels, "_queue", noted)
    parted = case.check()["h"]
    assert splits[0] > 1
    # Only the order of the sum differs.
    torch.testing.assert_close(parted, whole, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "case",
    [
        dict(M=1, N=1, K=1, R=1),
        dict(M=1, N=129, K=63, R=4, lora_e=True),
        dict(M=63, N=65, K=129, R=17, dropout_p=0.3, bias=True, lora_e=True),
        dict(M=65, N=63, K=64, R=64, dropout_p=0.5),
        dict(M=129, N=65, K=63, R=8, adapter_dtype=FP32, dropout_p=0.1, bias=True),
        dict(M=64, N=64, K=128, R=1, adapter_dtype=FP32, bias=True),
        dict(M=136, N=520, K=264, R=16, adapter_dtype=FP32, dropout_p=0.3, bias=True, lora_e=True),
        dict(M=72, N=136, K=200, R=130, adapter_dtype=FP32, dropout_p=0.1, lora_e=True),
        dict(M=65, N=63, K=129, R=4, dtype=FP16, dropout_p=0.5, lora_e=True),
        dict(M=40, N=264, K=72, R=32, dtype=FP16, adapter_dtype=FP32, bias=True),
        dict(M=1, N=1, K=1, R=1, column_scale=True),
        dict(M=65, N=129, K=63, R=17, dropout_p=0.3, bias=True, column_scale=True),
        dict(M=136, N=520, K=72, R=8, adapter_dtype=FP32, dropout_p=0.1, column_scale=True),
        dict(M=40, N=264, K=72, R=16, dtype=FP16, adapter_dtype=FP32, bias=True, lora_e=True, column_scale=True),
    ],
    ids=lambda c: f"{c['M']}x{c['N']}x{c['K']}r{c['R']}-{str(c.get('dtype', BF16))[6:]}",
)
def test_forward_and_backward_against_float64(case):
    Case(**case).check()


@pytest.mark.parametrize("nf4", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("M", [3, 65])
def test_group_matches_float64(M, dropout_p, nf4):
    case = group_case(M, BF16, FP32, nf4)
    with use_backend("cuda-emulated"):
        actual = group_results(lora_linear_group, *case, dropout_p)
    check_group(actual, *case, dropout_p, BF16)


def test_a_group_is_queued_at_once(monkeypatch):
    x, layers, dys = group_case(5, BF16, FP32, False)
    queued = []
    monkeypatch.setattr(
        EmulatedKernels,
        "_queue",
        lambda self, on, *launches: queued.append([name for name, _ in launches]),
    )
    forward = cuda_emulated.lora_linear_fwd(x, Layers(layers), None)
    # As Triton's are: columns of one matrix.
    ranks = [layer.lora_a.shape[0] for layer in layers]
    hs = torch.zeros(5, sum(ranks)).split(ranks, dim=1)
    needs = Needs(True, (AdapterNeeds(True, True),) * 3)
    cuda_emulated.lora_linear_bwd(dys, x, hs, Layers(layers), None, needs)
    backward = ["lora_dh_dlora_b", "lora_reduce", "lora_dlora_a", "lora_gemm"]
    assert queued == [["lora_h", "lora_few_rows"] * 3, backward * 3] and len(forward.ys) == 3


@pytest.mark.parametrize(
    "case",
    [
        dict(M=1, N=129, K=63, R=17, bias=True),
        dict(M=1, N=48, K=1200, R=16, adapter_dtype=FP32, dropout_p=0.1),
        dict(M=2, N=16, K=8, R=1, dtype=FP16, lora_e=True),
        dict(M=7, N=65, K=2056, R=70, adapter_dtype=FP32, bias=True, lora_e=True, column_scale=True),
        dict(M=8, N=15, K=129, R=64, adapter_dtype=FP32, column_scale=True),
        dict(M=9, N=40, K=136, R=4, dtype=FP16, adapter_dtype=FP32, bias=True),
        dict(M=15, N=33, K=1025, R=130, dropout_p=0.3, lora_e=True),
        dict(M=16, N=129, K=264, R=16, adapter_dtype=FP32, bias=True, column_scale=True),
        dict(M=17, N=33, K=264, R=16, adapter_dtype=FP32, bias=True, lora_e=True, column_scale=True),
    ],
    ids=lambda c: f"{c['M']}x{c['N']}x{c['K']}r{c['R']}-{str(c.get('dtype', BF16))[6:]}",
)
def test_few_rows(case, simt):
    """By the kernel for few rows up to 16, aligned and with strides, and by the product of tiles from there on."""
    case = Case(**case)
    expected = "LoraFewRows" if case.dy.shape[0] <= 16 else "LoraGemm"
    for place, kernel in (
        (lambda name, t: t, expected),
        (aligned_rows, expected),
        (padded_weight, expected),
        (unaligned, expected),
        (strided, "LoraGemm"),
    ):
        simt.take_traffic(record=True)
        case.check(place)
        assert simt.take_traffic(record=False)[1][0].startswith(kernel)


@pytest.mark.parametrize(
    "needs", [(1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (1, 0, 1, 0), (0, 1, 0, 1), (0, 0, 0, 0)]
)
def test_only_what_is_needed_is_computed(needs):
    Case(17, 33, 24, 4, dropout_p=0.2, lora_e=True, needs=tuple(map(bool, needs))).check()


def test_lora_e_gradient_is_none_without_lora_e():
    assert Case(5, 6, 7, 2).check()["dlora_e"] is None


@pytest.mark.parametrize("sizes", [(33, 65, 40, 5), (33, 72, 40, 5)])
@pytest.mark.parametrize(
    "place", [strided, aligned_rows, lambda name, t: t.T.contiguous().T if name == "weight" else t]
)
def test_strided_inputs_and_transposed_weight(sizes, place):
    Case(*sizes, dropout_p=0.2, bias=True, column_scale=True).check(place)


@pytest.mark.parametrize("sizes", [(35, 67, 41, 5), (40, 72, 48, 16)])
def test_guarded_buffers(sizes, monkeypatch):
    """Nothing outside the tensors is read or written, and every output element is: all of them start as NaN."""
    guarded = GuardedBuffers()
    case = Case(*sizes, adapter_dtype=FP32, dropout_p=0.2, bias=True, lora_e=True, column_scale=True)
    monkeypatch.setattr(torch, "empty", guarded)
    case.check(lambda name, t: guarded(t.shape, t.dtype).copy_(t))
    assert len(guarded.arenas) >= 18
    guarded.check()


@pytest.mark.parametrize("sizes", [(70, 530, 40, 5), (136, 136, 72, 40)])
def test_the_order_of_threads_and_blocks_does_not_matter(sizes, simt):
    case = Case(*sizes, adapter_dtype=FP32, dropout_p=0.2, bias=True, lora_e=True, column_scale=True)
    first = case.check()
    for schedule in (("reversed", 0), ("shuffled", 1), ("shuffled", 2)):
        simt.set_schedule(*schedule)
        for name, t in case.results().items():
            assert torch.equal(t, first[name]), f"{name} depends on the schedule {schedule}"


def test_launches(simt):
    options = dict(adapter_dtype=FP32, dropout_p=0.1, bias=True, lora_e=True)
    for expected, column_scale in ((6, False), (7, True)):
        case = Case(9, 10, 11, 3, **options, column_scale=column_scale)
        simt.take_traffic(record=True)
        case.results()
        kernels = [kernel for kernel, *_ in simt.take_traffic(record=False)]
        assert len(kernels) == expected, kernels


def test_a_pass_is_one_call_of_the_extension(simt, monkeypatch):
    """As on a GPU, where the emulator's backend would name each kernel's buffers in between."""
    case = Case(20, 33, 40, 5, adapter_dtype=FP32, dropout_p=0.1, bias=True, lora_e=True, column_scale=True)
    case.backend, calls, queue = cuda.Kernels("_simt", "cpu", "it is a test"), [], simt.queue
    simt.set_buffers({})

    def noted(launches, *where):
        calls.append([kernel for kernel, _ in launches])
        queue(launches, *where)

    monkeypatch.setattr(simt, "queue", noted)
    case.check()
    backward = ["lora_dh_dlora_b", "lora_reduce", "lora_dlora_a", "lora_gemm"]
    assert calls == [["lora_h", "lora_gemm"], ["column_scale_bwd"], backward]


@pytest.mark.parametrize("M", [3, 20])
@pytest.mark.parametrize("weight", ["dense", "nf4"])
@pytest.mark.parametrize("R", [0, 4])
def test_a_product_starts_early_only_where_lora_h_is_just_queued(simt, monkeypatch, M, weight, R):
    queued, queue = [None], simt.queue

    def noted(launches, *where):
        queued.extend(launches)
        queue(launches, *where)

    monkeypatch.setattr(simt, "queue", noted)
    t = lora_inputs(M, 24, 64, 4, BF16)
    w = t["weight"] if weight == "dense" else reference.quantize_nf4(t["weight"], 64, True)
    adapters = t["lora_a"][:R], t["lora_b"][:, :R]
    _, h = ONE.lora_linear_fwd(t["x"], w, *adapters, 1.0)
    *_, before, (_, product) = queued
    assert product["just_queued"] == (before is not None and before[0] == "lora_h")
    dy = torch.zeros(M, 24, dtype=BF16)
    ONE.lora_linear_bwd(dy, t["x"], h, w, *adapters, 1.0, None, 0.0, None, (True, False, False, False))
    assert queued[-1][0] == "lora_gemm" and not queued[-1][1]["just_queued"]


def test_the_arguments_of_a_kernel_are_checked(simt):
    x = torch.zeros(8, dtype=BF16)
    known = dict(weight=x, block_shift=6, packed=x, absmax=x)
    for arguments, error, message in (
        ({**known, "sizes": 8}, TypeError, "an argument is not known"),
        ({name: value for name, value in known.items() if name != "absmax"}, TypeError, "argument absmax is missing"),
        ({**known, "block_shift": 2**31}, ValueError, "block_shift is too large"),
        ({**known, "block_shift": 0.5}, TypeError, "float"),
        ({**known, "weight": 8}, ValueError, "of type int"),
    ):
        with pytest.raises(error, match=message):
            simt.queue([("nf4_quantize", arguments)], 0, 0)
    with pytest.raises(ValueError, match="there is no kernel lora_g"):
        simt.queue([("lora_g", {})], 0, 0)


def test_the_low_rank_term_alone():
    case = Case(65, 63, 64, 8)
    case.inputs["weight"].zero_()
    case.check()


def test_the_low_rank_term_beside_a_full_weight():
    check_low_rank_beside_a_full_weight(ONE)


def test_through_the_op_and_autograd():
    inputs = lora_inputs(12, 24, 16, 4, BF16, FP32, bias=True)
    dy, gradients = torch.randn(12, 24).bfloat16(), {}
    for backend in ("cuda-emulated", "reference"):
        torch.manual_seed(3)
        leaves = {name: t.clone().requires_grad_() for name, t in inputs.items() if t is not None}
        with backends.use_backend(backend):
            y = lora_linear(**leaves, scaling=SCALING, dropout_p=0.3)
            y.backward(dy)
        gradients[backend] = [leaves[name].grad.float() for name in ("x", "lora_a", "lora_b")]
    for actual, expected in zip(*gradients.values(), strict=True):
        assert (actual - expected).norm() < 0.01 * expected.norm()


def test_errors_name_the_argument():
    fwd = ONE.lora_linear_fwd
    x = torch.zeros(2, 2)
    with pytest.raises(ValueError, match="x is torch.float32: .*bfloat16 and float16"):
        fwd(x, x, x, x, 1.0)
    x16 = x.bfloat16()
    with pytest.raises(ValueError, match="lora_b is torch.float16; allowed: torch.float32 and x's torch.bfloat16"):
        fwd(x16, x16, x, x.half(), 1.0)
    with pytest.raises(ValueError, match="x is on meta"):
        fwd(x16.to("meta"), x16, x, x, 1.0)


def test_a_failed_launch_says_which_and_why(simt):
    case = Case(4, 4, 4, 2)
    simt.set_shared_memory_limit(1024)
    try:
        with pytest.raises(RuntimeError, match="lora_h: .*shared memory"):
            case.results()
    finally:
        simt.set_shared_memory_limit(99 << 10)


def test_unavailable_says_why():
    missing = cuda.Kernels("_no_such_module", "cuda", "it is a test")
    assert "lora_kernels._no_such_module can't be imported" in missing.unavailable
    assert missing.unavailable.endswith("; it is a test")
    if not torch.cuda.is_available():
        assert cuda.backend.unavailable is not None
        x = torch.zeros(1, 1, dtype=BF16)
        with pytest.raises(RuntimeError, match="can't run here"):
            OneLayer(cuda.backend).lora_linear_fwd(x, x, x, x, 1.0)
        with pytest.raises(RuntimeError, match="cuda backend, which can't run here"), backends.use_backend("cuda"):
            pass
