"""Choosing an implementation on a GPU, with a timer and a device that are made up, and the vendor's product itself."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from lora_cases import SCALING, LoraCase, OneLayer, strided

from lora_kernels import lora_linear, reference, use_backend
from lora_kernels.backends import choice as strategy
from lora_kernels.backends import triton
from lora_kernels.backends.triton import vendor
from lora_kernels.ops.nf4 import quantize_nf4
from lora_kernels.testing import lora_inputs

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
needs_triton = pytest.mark.skipif(triton.unavailable is not None, reason=str(triton.unavailable))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "cache" / "strategy.json"


def slow_and_fast(log):
    """Two steps and a timer that finds the second one faster."""
    steps = {"triton": lambda: log.append("triton"), "vendor": lambda: log.append("vendor")}

    def timer(step):
        step()
        return {"triton": 2.0, "vendor": 1.0}[log[-1]]

    return steps, timer


def test_the_fastest_is_chosen_measured_once_and_kept(path):
    steps, timer = slow_and_fast(log := [])
    choices = strategy.Choices(path)
    assert strategy.choose(choices, "a", steps, timer) == "vendor"
    assert strategy.choose(choices, "a", steps, timer) == "vendor"
    assert strategy.choose(strategy.Choices(path), "a", steps, timer) == "vendor"
    assert log == ["triton", "vendor"]
    assert strategy.choose(choices, "b", {"triton": steps["triton"]}, timer) == "triton"
    assert json.loads(path.read_text())["choices"]["a"] == {"choice": "vendor", "ms": {"triton": 2.0, "vendor": 1.0}}


def test_a_choice_that_is_no_candidate_any_more_is_measured_again(path):
    steps, timer = slow_and_fast([])
    choices = strategy.Choices(path)
    choices.put("a", {"cuda": 0.5})
    assert strategy.choose(choices, "a", steps, timer) == "vendor"


def test_out_of_memory_is_no_candidate_and_other_errors_are_raised(path):
    def fails(error):
        def step():
            raise error

        return step

    steps, timer = slow_and_fast([])
    memory = torch.OutOfMemoryError("too large")
    assert strategy.choose(strategy.Choices(path), "a", steps | {"vendor": fails(memory)}, timer) == "triton"
    with pytest.raises(torch.OutOfMemoryError, match="too large"):
        strategy.choose(strategy.Choices(path), "b", {"vendor": fails(memory)}, timer)
    with pytest.raises(RuntimeError, match="launch failed"):
        strategy.choose(strategy.Choices(path), "b", {"vendor": fails(RuntimeError("launch failed"))}, timer)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '{"made_by": "MADE_BY"}', '{"made_by": "MADE_BY", "choices": {"a": 3}}',
     '{"made_by": "MADE_BY", "choices": []}', '{"made_by": "older", "choices": {"a": {"choice": "triton", "ms": {}}}}',
     '{"made_by": "MADE_BY", "choices": {"a": {"choice": "rm -rf", "ms": {}}}}'],
)  # fmt: skip
def test_a_corrupt_or_old_file_is_made_anew(path, text):
    path.parent.mkdir()
    path.write_text(text.replace("MADE_BY", strategy._versions()))
    steps, timer = slow_and_fast([])
    assert strategy.choose(strategy.Choices(path), "a", steps, timer) == "vendor"
    assert json.loads(path.read_text())["choices"]["a"]["choice"] == "vendor"


def test_bytes_that_are_no_text(path):
    path.parent.mkdir()
    path.write_bytes(b"\xff\xfe\x00")
    strategy.Choices(path).put("a", {"triton": 1.0})
    assert strategy.Choices(path).get("a") == "triton"


def test_a_cache_that_cannot_be_written_is_kept_in_memory(tmp_path):
    (tmp_path / "file").write_text("")
    choices = strategy.Choices(tmp_path / "file" / "strategy.json")
    with pytest.warns(UserWarning, match="last for this process only"):
        choices.put("a", {"triton": 1.0})
    assert choices.get("a") == "triton"


WRITER = """
import sys
from pathlib import Path
from lora_kernels.backends.choice import Choices

choices = Choices(Path(sys.argv[1]))
for i in range(60):
    choices.put(f"{sys.argv[2]} {i}", {sys.argv[2]: 1.0})
    assert choices.get(f"{sys.argv[2]} 0") == sys.argv[2]
"""


def test_two_writers_leave_a_whole_file(path):
    """A choice written in the same instant may get lost and is measured again; the file is never half of one."""
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(path), name]) for name in ("triton", "vendor")]
    while any(writer.poll() is None for writer in writers):
        if path.exists():
            json.loads(path.read_text())
    assert [writer.returncode for writer in writers] == [0, 0]
    content = json.loads(path.read_text())["choices"]
    assert len(content) >= 60 and all(choice["choice"] in key for key, choice in content.items())
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_what_others_wrote_meanwhile_stays(path):
    """Both have read the file before either writes; the old file is replaced, not written into."""
    first, second = strategy.Choices(path), strategy.Choices(path)
    first.put("a", {"triton": 1.0})
    old = path.with_name("old")
    old.hardlink_to(path)
    before = old.read_text()
    second.put("b", {"vendor": 1.0})
    first.put("c", {"cuda": 1.0})
    assert old.read_text() == before
    kept = strategy.Choices(path)
    assert [kept.get(key) for key in "abc"] == ["triton", "vendor", "cuda"]
    # What a process has measured itself holds for it, whatever another one finds.
    second.put("a", {"vendor": 1.0})
    assert first.get("a") == "triton"


def test_time_on_the_gpu_and_the_least_time_to_queue(monkeypatch):
    """Of made-up clocks: after three passes of warm-up, nine whose GPU times have the median 7 ms and whose queueing
    takes 2 ms at least."""
    running = [5.0, 90.0, 7.0, 6.0, 8.0, 7.0, 4.0, 80.0, 9.0]
    queueing = [40.0, 3.0, 50.0, 4.0, 2.0, 30.0, 3.0, 60.0, 70.0]
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("record")

        def synchronize(self):
            log.append("synchronize")

        def elapsed_time(self, end):
            assert isinstance(end, Event)
            return running[log.count("synchronize") - 1]

    def clock():
        """Seconds since some time: 5 at the first call of a pass, and at the second one what queueing took more."""
        log.append("clock")
        calls = log.count("clock")
        return 5.0 if calls % 2 else 5.0 + queueing[calls // 2 - 1] / 1e3

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: log.append("sleep" if cycles > 1e6 else cycles))
    monkeypatch.setattr(strategy.time, "perf_counter", clock)
    assert strategy.time_ms(lambda: log.append("step")) == pytest.approx(7.0 + 2.0)
    measured = ["sleep", "record", "clock", "step", "clock", "record", "synchronize"]
    assert log == 3 * ["step"] + 9 * measured
    log.clear()
    assert strategy.time_ms(lambda: log.append("step"), queued_by_graph=True) == 7.0


@pytest.fixture
def fake_gpu(monkeypatch, path):
    """CPU tensors that `resolve` takes for tensors on a GPU; the log has what was timed."""
    log = []
    functions = ("lora_linear_fwd", "lora_linear_bwd")

    def module(name):
        def call(function):
            def run(*args):
                log.append((name, function))
                return getattr(reference, function)(*args)

            return run

        return SimpleNamespace(name=name, MAX_LAYERS=3, **{f: call(f) for f in functions})

    candidates = {name: module(name) for name in ("triton", "vendor")}

    def timer(step, queued_by_graph=False):
        step()
        return {"triton": 0.5 if queued_by_graph else 2.0, "vendor": 1.0}[log[-1][0]]

    monkeypatch.setattr(strategy, "_is_on_gpu", lambda x: True)
    monkeypatch.setattr(strategy, "_is_capturing", lambda: False)
    monkeypatch.setattr(strategy, "_gpu_name", lambda index: "NVIDIA Imaginary 1")
    monkeypatch.setattr(strategy, "_candidates", lambda x: candidates)
    monkeypatch.setattr(strategy.backends, "resolve", lambda x, activations: candidates["triton"])
    monkeypatch.setattr(strategy, "time_ms", timer)
    choices = strategy.Choices(path)
    monkeypatch.setattr(strategy, "_choices", lambda: choices)
    monkeypatch.delenv(strategy.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.delenv("LORA_KERNELS_BACKEND", raising=False)
    return SimpleNamespace(log=log, choices=choices, monkeypatch=monkeypatch)


def step(M=5, N=6, **options):
    inputs = lora_inputs(M, N, 7, 2, options.pop("dtype", FP32))
    leaves = {name: t.requires_grad_() for name, t in inputs.items() if t is not None}
    weight = leaves["weight"].detach_()
    y = lora_linear(leaves.pop("x"), weight, leaves.pop("lora_a"), leaves.pop("lora_b"), SCALING, **options)
    y.sum().backward()


def test_forward_and_backward_are_measured_once_a_bucket(fake_gpu):
    step()
    assert fake_gpu.log == [
        ("triton", "lora_linear_fwd"), ("vendor", "lora_linear_fwd"), ("vendor", "lora_linear_fwd"),
        ("triton", "lora_linear_bwd"), ("vendor", "lora_linear_bwd"), ("vendor", "lora_linear_bwd"),
    ]  # fmt: skip
    fake_gpu.log.clear()
    step(M=8)
    assert fake_gpu.log == [("vendor", "lora_linear_fwd"), ("vendor", "lora_linear_bwd")]
    for change in ({"M": 9}, {"N": 9}, {"dtype": BF16}, {"dropout_p": 0.5}):
        fake_gpu.log.clear()
        step(**change)
        assert ("triton", "lora_linear_fwd") in fake_gpu.log, change
    key = next(iter(json.loads(fake_gpu.choices.path.read_text())["choices"]))
    assert key == "lora_linear_fwd 000, NVIDIA Imaginary 1, float32, M<=8 K=7, dense N=6 R=2 float32"


@pytest.mark.parametrize(("value", "expected"), [("fused", "triton"), ("vendor", "vendor")])
def test_the_variable_switches_measuring_off(fake_gpu, value, expected):
    fake_gpu.monkeypatch.setenv(strategy.ENVIRONMENT_VARIABLE, value)
    if vendor.unsupported(FP32) is None:
        step()
        assert {name for name, _ in fake_gpu.log} == {expected} and len(fake_gpu.log) == 2
        assert not fake_gpu.choices.path.exists()


def test_errors_of_the_variable(fake_gpu):
    fake_gpu.monkeypatch.setenv(strategy.ENVIRONMENT_VARIABLE, "fastest")
    with pytest.raises(ValueError, match="LORA_KERNELS_STRATEGY is 'fastest'; allowed: auto, fused, vendor"):
        step()
    fake_gpu.monkeypatch.setenv(strategy.ENVIRONMENT_VARIABLE, "vendor")
    fake_gpu.monkeypatch.setattr(vendor, "unsupported", lambda dtype: "torch is too old")
    with pytest.raises(RuntimeError, match="=vendor can't be used with x of torch.float32: torch is too old"):
        step()


def test_nothing_is_measured_during_graph_capture(fake_gpu):
    fake_gpu.monkeypatch.setattr(strategy, "_is_capturing", lambda: True)
    step()
    assert fake_gpu.log == [("triton", "lora_linear_fwd"), ("triton", "lora_linear_bwd")]
    assert not fake_gpu.choices.path.exists()

    fake_gpu.monkeypatch.setattr(strategy, "_is_capturing", lambda: False)
    step()
    fake_gpu.monkeypatch.setattr(strategy, "_is_capturing", lambda: True)
    fake_gpu.log.clear()
    step()
    assert fake_gpu.log == [("vendor", "lora_linear_fwd"), ("vendor", "lora_linear_bwd")], "a known choice holds there"


def test_for_a_graph_the_time_on_the_gpu_decides(fake_gpu):
    step()
    with strategy.for_graphs():
        step()
        fake_gpu.monkeypatch.setattr(strategy, "_is_capturing", lambda: True)
        fake_gpu.log.clear()
        step()
        assert fake_gpu.log == [("triton", "lora_linear_fwd"), ("triton", "lora_linear_bwd")]
    fake_gpu.log.clear()
    step()
    assert fake_gpu.log == [("vendor", "lora_linear_fwd"), ("vendor", "lora_linear_bwd")]
    keys = json.loads(fake_gpu.choices.path.read_text())["choices"]
    assert sum(key.endswith(", in a graph") for key in keys) == 2 and len(keys) == 4


def test_nothing_is_measured_for_a_named_backend(fake_gpu):
    with use_backend("reference"):
        step()
    assert fake_gpu.log == [("triton", "lora_linear_fwd"), ("triton", "lora_linear_bwd")]


def test_nothing_is_measured_on_the_cpu(monkeypatch):
    monkeypatch.setattr(strategy, "_choices", lambda: pytest.fail("the cache was opened"))
    monkeypatch.setattr(strategy, "mode", lambda: pytest.fail("the variable was read"))
    step()


class VendorCase(LoraCase):
    backend = triton.by_vendor if triton.unavailable is None else None


@needs_triton
@pytest.mark.parametrize(
    "case",
    [
        dict(M=1, N=1, K=1, R=1, dtype=BF16),
        dict(M=33, N=65, K=63, R=17, dropout_p=0.3, bias=True, lora_e=True, dtype=BF16, adapter_dtype=FP32),
        dict(M=17, N=40, K=24, R=4, dropout_p=0.5, dtype=FP16),
        dict(M=33, N=65, K=63, R=8, dropout_p=0.3, bias=True),
        dict(M=33, N=65, K=63, R=8, dropout_p=0.3, bias=True, column_scale=True),
        dict(M=33, N=65, K=63, R=8, dtype=BF16, adapter_dtype=FP32, column_scale=True),
    ],
    ids=lambda c: f"{c['M']}x{c['N']}x{c['K']}r{c['R']}-{str(c.get('dtype', FP32))[6:]}",
)
def test_vendor_against_float64(case):
    VendorCase(**case).check()
    VendorCase(**case).check(strided)


@needs_triton
def test_vendor_with_an_nf4_weight_equals_that_with_the_dense_one():
    inputs = lora_inputs(9, 24, 64, 4, BF16, FP32)
    weight = quantize_nf4(inputs["weight"])
    run = OneLayer(VendorCase.backend).lora_linear_fwd
    results = [
        run(inputs["x"], w, inputs["lora_a"], inputs["lora_b"], SCALING)[0]
        for w in (weight.tensors(), weight.dequantize())
    ]
    assert torch.equal(*results)


@needs_triton
@pytest.mark.parametrize("bias", [False, True])
def test_small_update_survives_rounding(bias):
    """⟨y - x Wᵀ - bias, Δ⟩ / ⟨Δ, Δ⟩ = 1 within 1 % at ‖sBA‖ / ‖W‖ = 1e-3 in bfloat16."""
    inputs = lora_inputs(512, 256, 128, 8, BF16, bias=bias)
    update = SCALING * inputs["lora_b"].double() @ inputs["lora_a"].double()
    inputs["lora_b"] *= 1e-3 * inputs["weight"].double().norm() / update.norm()
    exact = {name: None if t is None else t.double() for name, t in inputs.items()}
    delta = SCALING * exact["x"] @ exact["lora_a"].T @ exact["lora_b"].T
    base = torch.nn.functional.linear(exact["x"], exact["weight"], exact["bias"])
    args = (SCALING, inputs["bias"], None, 0.0, None)
    y, _ = OneLayer(VendorCase.backend).lora_linear_fwd(
        *(inputs[n] for n in ("x", "weight", "lora_a", "lora_b")), *args
    )
    projection = ((y.double() - base) * delta).sum() / (delta * delta).sum()
    assert abs(projection - 1) < 0.01, f"projection {projection:.4f}"


def test_vendor_says_why_it_is_unsupported(monkeypatch):
    assert vendor.unsupported(FP32) is None
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert "ROCm" in vendor.unsupported(BF16) and vendor.unsupported(FP32) is None
