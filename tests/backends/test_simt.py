"""The SIMT emulator: its instructions against formulas, and that it reports the mistakes it is there to find."""

import ctypes
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from places import ROOT, TESTS

HERE = TESTS / "simt"
SCHEDULES = ["forward", "reversed", "shuffled:1", "shuffled:2"]

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("c++") is None, reason="the emulator needs Linux and a C++ compiler"
)


# What -fsanitize=thread is for: csrc/simt/memory.h. Only kernels are compiled with it, and it is not linked.
ACCESSES = {"kernel_flags": ["-fsanitize=thread"]}
ADDRESS = {"flags": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]}


def build(output: str, kernels: list[Path], kernel_flags=(), flags=(), link_flags=()) -> Path:
    """Compile kernels with the emulator, unless the same sources and flags were compiled before."""
    engine = sorted((ROOT / "csrc/simt").glob("*.cpp"))
    digest = hashlib.sha256(repr((output, kernels, kernel_flags, flags, link_flags)).encode())
    headers = [path for folder in (ROOT / "csrc", HERE) for name in ("*.h", "*.cuh") for path in folder.rglob(name)]
    for path in sorted([*engine, *kernels, *headers]):
        digest.update(path.read_bytes())
    folder = ROOT / "build/simt_tests" / digest.hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / output
    # Several test processes want the same one.
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.exists():
            return target
        common = ["c++", "-std=c++17", "-O1", "-g1", "-fPIC", "-ffp-contract=off", "-DLK_SIMT", "-Wno-psabi"]
        common += [f"-I{ROOT}/csrc", *flags]
        compilers = {path: [*common, *kernel_flags, "-x", "c++", "-c"] for path in kernels}
        compilers |= {path: [*common, "-c"] for path in engine}
        commands = [[*command, str(path), "-o", f"{folder}/{path.stem}.o"] for path, command in compilers.items()]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda command: subprocess.run(command, check=True), commands))
        objects = [command[-1] for command in commands]
        unfinished = target.with_suffix(".unfinished")
        subprocess.run(["c++", *flags, *link_flags, *objects, "-o", str(unfinished), "-ldl"], check=True)
        os.replace(unfinished, target)
    return target


@pytest.fixture(scope="session")
def probe():
    library = ctypes.CDLL(str(build("probe.so", [HERE / "probe.cu"], **ACCESSES, link_flags=["-shared"])))
    for name in ("load_matrices", "mma", "gemm", "shuffle", "vote", "block_vote", "coordinates"):
        getattr(library, f"run_{name}").restype = ctypes.c_char_p
    library.set_schedule.argtypes = [ctypes.c_int, ctypes.c_uint64]
    return library


@pytest.fixture(params=SCHEDULES)
def schedule(request, probe):
    name, _, seed = request.param.partition(":")
    probe.set_schedule(["forward", "reversed", "shuffled"].index(name), int(seed or 0))
    yield
    probe.set_schedule(0, 0)


def pointer(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def bits(values: torch.Tensor) -> np.ndarray:
    return values.contiguous().view(torch.int16).numpy().view(np.uint16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_conversions_round_as_torch(probe, dtype):
    is_half = dtype == torch.float16
    every = np.arange(65536, dtype=np.uint16)
    widened = np.empty(65536, np.float32)
    probe.to_float(pointer(every), pointer(widened), 65536, is_half)
    expected = torch.from_numpy(every.view(np.int16)).view(dtype).float().numpy()
    np.testing.assert_array_equal(widened, expected)

    # Every value, halfway to the next one, and a little to both sides of that; subnormals, overflow, infinity.
    finite = np.sort(expected[np.isfinite(expected)])
    middle = ((finite[:-1].astype(np.float64) + finite[1:]) / 2).astype(np.float32)
    beyond = np.array([65504, 65519.996, 65520, 65536, 3.3895e38, 3.4e38, np.inf, 2.0**-25, 2.0**-26], np.float32)
    inputs = np.concatenate([finite, middle, np.nextafter(middle, np.inf), np.nextafter(middle, -np.inf), beyond])
    inputs = np.concatenate([inputs, -inputs]).astype(np.float32)
    rounded = np.empty(inputs.size, np.uint16)
    probe.from_float(pointer(inputs), pointer(rounded), inputs.size, is_half)
    np.testing.assert_array_equal(rounded, bits(torch.from_numpy(inputs).to(dtype)))

    nan, narrow = np.array([np.nan, -np.nan], np.float32), np.empty(2, np.uint16)
    probe.from_float(pointer(nan), pointer(narrow), 2, is_half)
    assert torch.from_numpy(narrow.view(np.int16)).view(dtype).isnan().all()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [2, 4])
def test_ldmatrix(probe, schedule, count, transposed):
    matrices = np.arange(count * 64, dtype=np.uint16).reshape(count, 8, 8)
    registers = np.zeros((32, count), np.uint32)
    assert probe.run_load_matrices(pointer(matrices), pointer(registers), count, transposed) == b""
    # PTX ISA, ldmatrix: thread T holds row T / 4, elements 2 (T % 4) and the next; with .trans, of the transpose.
    logical = matrices.transpose(0, 2, 1) if transposed else matrices
    for thread in range(32):
        for i in range(count):
            low, high = logical[i, thread // 4, thread % 4 * 2 : thread % 4 * 2 + 2]
            assert registers[thread, i] == int(low) | int(high) << 16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mma_fragments(probe, schedule, dtype):
    a, b = torch.randn(16, 16).to(dtype), torch.randn(16, 8).to(dtype)
    c = torch.randn(16, 8)
    bits_a, bits_b = bits(a), bits(b)
    packed_a, packed_b = np.zeros((32, 4, 2), np.uint16), np.zeros((32, 2, 2), np.uint16)
    packed_c = np.zeros((32, 4), np.float32)
    # PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type"; a_i is half i % 2 of register i / 2.
    for lane in range(32):
        group, thread_in_group = lane >> 2, lane % 4
        for i in range(8):
            row = group if i < 2 or 4 <= i < 6 else group + 8
            column = thread_in_group * 2 + (i & 1) + (8 if i >= 4 else 0)
            packed_a[lane, i // 2, i % 2] = bits_a[row, column]
        for i in range(4):
            row = thread_in_group * 2 + (i & 1) + (8 if i >= 2 else 0)
            packed_b[lane, i // 2, i % 2] = bits_b[row, group]
            packed_c[lane, i] = c[group if i < 2 else group + 8, thread_in_group * 2 + (i & 1)]
    assert probe.run_mma(pointer(packed_a), pointer(packed_b), pointer(packed_c), dtype == torch.float16) == b""
    expected = c.double() + a.double() @ b.double()
    for lane in range(32):
        for i in range(4):
            row, column = lane // 4 + (8 if i >= 2 else 0), lane % 4 * 2 + i % 2
            assert abs(packed_c[lane, i] - expected[row, column].item()) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1, 8), (64, 64, 32), (129, 129, 136)])
def test_gemm(probe, schedule, shape, dtype):
    M, N, K = shape
    a, b = torch.randn(M, K).to(dtype), torch.randn(N, K).to(dtype)
    c = np.full((M, N), np.nan, np.float32)
    bits_a, bits_b = bits(a), bits(b)
    assert probe.run_gemm(pointer(bits_a), pointer(bits_b), pointer(c), M, N, K, dtype == torch.float16) == b""
    expected = a.double() @ b.double().T
    # Of sums in float32, whatever their order.
    bound = K * 2.0**-24 * (a.double().abs() @ b.double().abs().T)
    assert (abs(torch.from_numpy(c).double() - expected) <= bound).all()


@pytest.mark.parametrize("mask", [0xFFFFFFFF, 0x00FF00FF])
@pytest.mark.parametrize("width", [32, 8])
@pytest.mark.parametrize("kind", ["index", "xor", "up", "down"])
def test_shuffles(probe, schedule, kind, width, mask):
    lanes = np.arange(32)
    first = lanes // width * width
    for operand in (0, 1, 3, 7):
        # CUDA C++ Programming Guide, warp shuffle functions: a source outside the segment leaves the lane's own value.
        source = {
            "index": first + operand % width,
            "xor": lanes ^ operand,
            "up": np.where(lanes - operand >= first, lanes - operand, lanes),
            "down": np.where(lanes + operand < first + width, lanes + operand, lanes),
        }[kind]
        active = (mask >> lanes & 1) == 1
        if not active[source[active]].all():
            continue
        values, out = np.random.default_rng(0).normal(size=32).astype(np.float32), np.zeros(32, np.float32)
        operands = np.full(32, operand, np.int64)
        number = ["index", "xor", "up", "down"].index(kind)
        problem = probe.run_shuffle(
            number, ctypes.c_uint32(mask), pointer(operands), width, pointer(values), pointer(out)
        )
        assert problem == b""
        np.testing.assert_array_equal(out, np.where(active, values[source], 0))


def test_shuffle_from_a_lane_of_each_ones_choice(probe, schedule):
    source = np.random.default_rng(1).permutation(32).astype(np.int64)
    values, out = np.arange(32, dtype=np.float32), np.zeros(32, np.float32)
    assert probe.run_shuffle(0, ctypes.c_uint32(0xFFFFFFFF), pointer(source), 32, pointer(values), pointer(out)) == b""
    np.testing.assert_array_equal(out, values[source])


@pytest.mark.parametrize("mask", [0xFFFFFFFF, 0xFFFF0000, 0x00000001])
@pytest.mark.parametrize("votes", [0x00000000, 0xFFFFFFFF, 0xFFFF0001, 0x80000000])
def test_votes(probe, schedule, mask, votes):
    lanes = np.arange(32)
    predicate, out = (votes >> lanes & 1).astype(np.int32), np.full((32, 3), 99, np.uint32)
    assert probe.run_vote(ctypes.c_uint32(mask), pointer(predicate), pointer(out)) == b""
    active = (mask >> lanes & 1) == 1
    expected = [votes & mask, int(votes & mask != 0), int(votes & mask == mask)]
    np.testing.assert_array_equal(out[active], np.tile(np.array(expected, np.uint32), (active.sum(), 1)))


@pytest.mark.parametrize("threads", [1, 33, 1024])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_barriers_that_count(probe, schedule, threads, share):
    predicate = np.zeros(threads, np.int32)
    predicate[: int(threads * share)] = 5
    out = np.full((threads, 3), 99, np.int32)
    assert probe.run_block_vote(threads, pointer(predicate), pointer(out)) == b""
    count = np.count_nonzero(predicate)
    np.testing.assert_array_equal(out, np.tile([count, count > 0, count == threads], (threads, 1)))


def test_every_thread_of_the_grid_runs_once(probe, schedule):
    sizes = np.array([3, 4, 2, 5, 3, 2], np.uint32)
    out, count = np.full(sizes.prod(), -1, np.int32), np.zeros(1, np.int32)
    assert probe.run_coordinates(pointer(sizes), pointer(out), pointer(count)) == b""
    assert count[0] == sizes.prod()
    np.testing.assert_array_equal(out, np.arange(sizes.prod()))


@pytest.mark.parametrize(
    "sizes", [(1, 1, 1, 1025, 1, 1), (1, 1, 1, 1, 1, 65), (1, 65536, 1, 1, 1, 1), (0, 1, 1, 1, 1, 1)]
)
def test_launches_that_a_gpu_refuses(probe, sizes):
    out = np.zeros(1, np.int32)
    assert b"at most" in probe.run_coordinates(pointer(np.array(sizes, np.uint32)), pointer(out), pointer(out))


# What each mistake in tests/simt/mutants.cu is reported as where every access is seen, and under AddressSanitizer,
# which knows no barriers. None: that build sees only the result, which is wrong under some schedule.
MUTANTS = {
    "reverse": ("data race", None),
    "reuse": ("data race", None),
    "lanes": ("data race", None),
    "missing_barrier": ("data race", "data race"),
    "blocks": ("of out, which has 2048 bytes: this", None),
    "missing_wait": ("which a cp.async is still to write", "which a cp.async is still to write"),
    "missing_commit": ("which a cp.async is still to write", "which a cp.async is still to write"),
    "write_in_flight": ("which a cp.async is still to write", "while it was in flight"),
    "swapped_fragment": ("wrong result", "wrong result"),
    "uninitialised": ("wrong result: out[7] = -nan", "wrong result: out[7] = -nan"),
    "off_by_one": ("from byte 800 of in, which has 800 bytes", "heap-buffer-overflow"),
    "off_by_one_store": ("a store to 4 bytes from byte 512 of out", "heap-buffer-overflow"),
    "shared_overflow": ("a store to byte 512 of 512 bytes of dynamic shared memory", "use-after-poison"),
    "misaligned_vector": ("load of float4: the address is not a multiple of 16", "misaligned address"),
    "misaligned_copy": ("cp.async source: the address is not a multiple of 16", "cp.async source"),
    "misaligned_matrix": ("ldmatrix: the address is not a multiple of 16", "ldmatrix"),
    "barrier_in_branch": ("waits for ever in __syncthreads: thread (64,0,0) has exited",) * 2,
    "two_barriers": ("waits at another barrier, __syncthreads",) * 2,
    "barrier_after_exit": ("waits for ever in __syncthreads: thread (5,0,0) has exited",) * 2,
    "shuffle_in_branch": ("waits for ever in __shfl_xor_sync: thread (16,0,0) has exited",) * 2,
    "shuffle_outside_mask": ("lane 0 reads lane 16, which is not in its mask",) * 2,
    "too_much_shared": ("102400 bytes of dynamic shared memory; allowed: 101376",) * 2,
}


def run(program: Path, name: str, mutant: bool, schedule: str) -> tuple[int, str]:
    environment = {**os.environ, "LORA_KERNELS_SIMT_SCHEDULE": schedule}
    command = [str(program), name, str(int(mutant))]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    return result.returncode, result.stdout + result.stderr


@pytest.mark.parametrize("sanitizer", ["accesses", "address"])
@pytest.mark.parametrize("name", MUTANTS)
def test_mistakes_are_reported_and_correct_twins_pass(name, sanitizer):
    is_address = sanitizer == "address"
    program = build("mutants", [HERE / "mutants.cu"], **(ADDRESS if is_address else ACCESSES))
    message = MUTANTS[name][is_address]
    found = []
    for schedule in SCHEDULES:
        assert run(program, name, False, schedule) == (0, "\n")
        code, text = run(program, name, True, schedule)
        if message is not None:
            assert code != 0 and message in text, text
        found.append(code != 0)
    assert any(found)


def test_an_unknown_schedule_is_an_error():
    program = build("mutants", [HERE / "mutants.cu"], **ACCESSES)
    code, text = run(program, "reverse", False, "sideways")
    assert code == 1
    assert "LORA_KERNELS_SIMT_SCHEDULE is 'sideways'; allowed: forward, reversed, shuffled:SEED" in text


@pytest.mark.slow
def test_without_the_x86_stack_switch():
    program = build("mutants", [HERE / "mutants.cu"], **ACCESSES, flags=["-DLK_SIMT_UCONTEXT"])
    for schedule in SCHEDULES:
        for name in ("reverse", "missing_barrier", "barrier_after_exit"):
            assert run(program, name, False, schedule) == (0, "\n")
            code, text = run(program, name, True, schedule)
            assert code == 1 and MUTANTS[name][0] in text


@pytest.mark.slow
def test_the_kernels_under_address_and_undefined_behaviour_sanitizer():
    """The tests of the kernels in a process whose lora_kernels._simt is compiled with both."""
    import pybind11

    sources = [*sorted((ROOT / "csrc/cuda").glob("*.cu")), ROOT / "csrc/cuda/bindings.cpp"]
    includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}", "-fvisibility=hidden"]
    name = "_simt" + sysconfig.get_config_var("EXT_SUFFIX")
    module = build(name, sources, flags=[*ADDRESS["flags"], *includes], link_flags=["-shared"])
    program = (
        "import sys, lora_kernels\n"
        "lora_kernels.__path__.insert(0, sys.argv[1])\n"
        "from lora_kernels import _simt\n"
        "assert _simt.__file__.startswith(sys.argv[1])\n"
        "import pytest\n"
        "sys.exit(pytest.main(['-q', '-x', '-p', 'no:cacheprovider', *sys.argv[2:]]))\n"
    )
    runtimes = [
        subprocess.run(["c++", f"-print-file-name=lib{name}.so"], capture_output=True, text=True).stdout.strip()
        for name in ("asan", "ubsan", "stdc++")
    ]
    environment = {
        **os.environ,
        "LD_PRELOAD": ":".join(runtimes),
        # Python frees little of what it allocates at exit.
        "ASAN_OPTIONS": "detect_leaks=0",
        "PYTHONPATH": str(ROOT),
    }
    environment.pop("PYTEST_XDIST_WORKER", None)
    # The others count traffic or look for races, which this build doesn't see, or compile with nvcc.
    tests = [str(TESTS / "backends" / f"test_{name}.py") for name in ("cuda", "cuda_adamw", "cuda_nf4")]
    tests += ["-k", "not test_decoding_reads_little"]
    command = [sys.executable, "-c", program, str(module.parent), *tests]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout and "skipped" not in result.stdout
