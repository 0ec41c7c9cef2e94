"""The benchmarks measure what they say: contenders do the same work, ratios and memory are right, files are whole."""

import csv
import json
import random

import pytest
import torch
from typer.testing import CliRunner

from lora_kernels.bench import attention, cases, lora_linear, report, traffic, train
from lora_kernels.bench.measure import Worker, interleave
from lora_kernels.cli.commands import app
from lora_kernels.testing import assert_close_to_reference


def test_interleave_gives_medians_and_ratios_of_the_same_round():
    random.seed(0)
    # The third round is ten times slower for both.
    times = {"bare": [2.0, 2.0, 20.0, 2.0], "ours": [3.0, 3.0, 30.0, 5.0]}
    left = {name: list(values) for name, values in times.items()}
    found = interleave(dict.fromkeys(times) | {name: name for name in times}, 4, "bare", lambda name: left[name].pop(0))
    assert found["ours"]["ratio"] == 1.5 and found["bare"]["ratio"] == 1.0
    assert found["ours"]["median_ms"] == 4000.0 and found["ours"]["min_ms"] == 3000.0
    assert found["bare"]["low_ms"] == 2000.0 < found["bare"]["high_ms"]


def test_no_round_begins_after_the_budget_but_three_are_run():
    left = [8.0, 2.0, 3.0]
    found = interleave({"a": "a"}, 50, "a", lambda name: left.pop(), budget_s=0.0)
    assert (found["a"]["min_ms"], found["a"]["median_ms"], left) == (2000.0, 3000.0, [])


def allocate(mib):
    return lambda: torch.ones(mib << 18).sum().item()


def break_off():
    raise SystemExit("the reason")


def test_a_worker_measures_the_memory_of_its_own_step():
    with Worker("test_bench:allocate", 1, mib=96) as worker:
        worker.seconds()
        memory = worker.memory()
        assert 90 < memory["above_mib"] < 110 and memory["peak_mib"] > memory["above_mib"]
    with Worker("test_bench:break_off", 1) as worker, pytest.raises(RuntimeError, match="the reason"):
        worker.ready()


def test_contenders_compute_the_same():
    sizes = {"M": 33, "N": 48, "K": 64, "R": 4, "dropout_p": 0.0, "dtype": torch.float32}
    grads = {name: lora_linear.make_step(name, **sizes)() for name in ("bare", "ours", "eager", "addmm", "ours-dora")}
    exact = lora_linear.make_step("addmm", **sizes | {"dtype": torch.float64})()
    for name in ("eager", "addmm"):
        for ours, theirs, wide in zip(grads["ours"], grads[name], exact, strict=True):
            assert_close_to_reference(ours, theirs, wide, "ours")
            assert_close_to_reference(theirs, ours, wide, name)
    # Their B starts at zero: dx is that of the frozen layer.
    pytest.importorskip("peft")
    for name in ("peft", "peft-dora"):
        torch.testing.assert_close(lora_linear.make_step(name, **sizes)()[0], grads["bare"][0])
    torch.testing.assert_close(grads["ours-dora"][0], grads["bare"][0])


@pytest.mark.parametrize("M", [2, 33])
def test_contenders_of_a_group_compute_the_same(M):
    sizes = {"M": M, "N": (48, 16), "K": 64, "R": 4, "dropout_p": 0.0, "dtype": torch.float32}
    results = {name: lora_linear.group_step(name, **sizes)() for name in lora_linear.GROUP if "peft" not in name}
    for name in ("ours", "ours-nf4"):
        for one, apart in zip(results[name], results[f"{name}-apart"], strict=True):
            torch.testing.assert_close(one, apart)
    if M > lora_linear.FEW_ROWS:
        assert [len(grads) for grads in results.values()] == [1, 5, 5, 5, 5]
    if not cases.missing("peft"):
        # Their B starts at zero.
        torch.testing.assert_close(lora_linear.group_step("peft", **sizes)()[0], results["bare"][0])


def test_contenders_of_attention_compute_the_same():
    base, *others = (attention.make_step(name, 2, 33, torch.float32)() for name in attention.CONTENDERS)
    exact = attention.make_step("torch", 2, 33, torch.float64)()
    for grads in others:
        for found, eager, wide in zip(grads, base, exact, strict=True):
            assert_close_to_reference(found, eager, wide, "gradient")


def test_few_rows_are_a_forward_without_gradients():
    y = lora_linear.make_step("ours", 2, 48, 64, 4, 0.1, torch.float32)()
    assert y.shape == (2, 48) and not y.requires_grad


def test_the_floor_is_that_of_the_frozen_linear(monkeypatch):
    monkeypatch.setattr(cases, "product_rate", lambda dtype: 100.0)
    monkeypatch.setattr(cases, "read_bandwidth", lambda: 10.0)
    settings = cases.Settings(torch.float32)
    compute = lora_linear.case(512, 4096, 4096, 16, 0.1, settings)
    assert cases.floor_ms(compute, torch.float32) == pytest.approx(4 * 512 * 4096**2 / 100e9 * 1e3)
    memory = lora_linear.case(1, 4096, 4096, 16, 0.1, settings)
    assert cases.floor_ms(memory, torch.float32) == pytest.approx(4 * (4096**2 + 2 * 4096) / 10e9 * 1e3)


def test_passes_over_the_large_tensors_are_told_apart():
    M, N, K = 128, 256, 192
    mk, mn, nk = 2 * M * K, 2 * M * N, 2 * N * K
    launches = [("h", mk + 400, 512), ("y", mk + nk + 1000, mn), ("dx", mn + nk + 900, mk)]
    assert traffic.passes(launches, M, N, K) == {"MK": 3, "MN": 2}


def test_counted_passes_are_those_that_the_design_states():
    row = traffic.Passes().run(cases.Settings())
    assert row["contenders"]["PEFT"]["MN"] == 12
    counted = {name: values for name, values in row["contenders"].items() if name.startswith("ours")}
    assert len(counted) + len(row["skipped"]) == 2
    if not counted:
        pytest.skip("neither the interpreter nor the emulator can run here")
    assert {(values["MK"], values["MN"]) for values in counted.values()} == {(4, 3)}


def bench(*options):
    result = CliRunner().invoke(app, ["bench", "--quick", "--rounds", "3", "--threads", "1", *map(str, options)])
    return result.exit_code, result.output


def test_command_line(tmp_path):
    pytest.importorskip("matplotlib")
    only = ["--suite", "ops", "--dtype", "float32", "--only", "nf4-dequantize|adamw"]
    code, output = bench(*only, "--output-dir", tmp_path)
    assert code == 0, output
    found = json.loads((tmp_path / "results.json").read_text())
    assert [row["work"] for row in found["results"]] == ["nf4-dequantize", "nf4-dequantize-into", "adamw"]
    assert found["machine"]["cores"] and found["threads"] == 1 and not found["failed"]
    times = found["results"][2]["contenders"]
    assert times["ours"]["ratio"] == 1.0 and times["foreach"]["median_ms"] > 0 and times["ours"]["gb_per_s"] > 0
    rows = list(csv.DictReader((tmp_path / "results.csv").open()))
    assert {row["contender"] for row in rows if row["work"] == "adamw"} == {"ours", "foreach", "fused"}
    assert float(rows[-1]["median_ms"]) == pytest.approx(times[rows[-1]["contender"]]["median_ms"])
    assert "## adamw" in (tmp_path / "results.md").read_text()
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")

    # Twice as fast before, by the file.
    times["foreach"]["ratio"] /= 100
    (tmp_path / "results.json").write_text(json.dumps(found))
    code, output = bench(*only, "--output-dir", tmp_path, "--compare", tmp_path / "results.json")
    assert code == 1 and "adamw" in output and "foreach: time over ours" in output


def row_of(**contenders):
    return {"work": "w", "what": {"M": 1}, "base": "bare", "contenders": contenders}


def test_regressions_are_ratios_beyond_the_tolerance(tmp_path):
    earlier = [row_of(ours={"ratio": 1.0}, peft={"ratio": 2.0, "above_mib": 10})]
    within, beyond = 1 + report.TOLERANCE - 0.01, 1 + report.TOLERANCE + 0.01
    assert report.regressions([row_of(ours={"ratio": within})], earlier) == []
    slower = report.regressions([row_of(ours={"ratio": beyond}, peft={"ratio": 1.0, "above_mib": 20})], earlier)
    assert slower == ["w M=1, ours: time over bare 1 -> 1.16", "w M=1, peft: MiB of a step 10 -> 20"]
    with pytest.raises(ValueError, match="none of the cases"):
        report.regressions([{**row_of(ours={"ratio": 1.0}), "work": "other"}], earlier)
    (tmp_path / "earlier.json").write_text("[]")
    with pytest.raises(ValueError, match="is not a result"):
        report.read_rows(tmp_path / "earlier.json")


@pytest.mark.parametrize(
    "options, message",
    [
        (["--suite", "op"], "suite is 'op'; allowed: ops, train, memory, traffic"),
        (["--suite", "ops", "--only", "nothing-like-it"], "no case of ops has such a name"),
        (["--suite", "ops", "--only", "["], "only is '['; it must be a regular expression"),
        (["--threads", "0"], "threads is 0"),
        (["--dtype", "stored"], "dtype is 'stored'"),
        (["--compare", "absent.json"], "absent.json does not exist"),
    ],
)
def test_bad_input_is_refused_and_nothing_is_written(tmp_path, options, message):
    code, output = bench(*options, "--output-dir", tmp_path / "out")
    assert code == 2 and message in output
    assert not (tmp_path / "out").exists()


def test_a_case_that_fails_is_reported_and_the_rest_goes_on(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from lora_kernels.bench import adamw

    def broken(contender, layers, R):
        if contender in unlucky:
            raise RuntimeError("out of luck")
        return make_step(contender, layers, R)

    make_step = adamw.make_step
    monkeypatch.setattr(adamw, "make_step", broken)
    unlucky = ("foreach",)
    code, output = bench("--suite", "ops", "--only", "adamw|dequantize-into", "--output-dir", tmp_path)
    assert code == 1 and "foreach: failed: RuntimeError: out of luck" in output
    found = json.loads((tmp_path / "results.json").read_text())
    assert list(found["failed"].values()) == ["RuntimeError: out of luck"]
    assert "ours" in found["results"][0]["contenders"] and set(found["results"][1]["contenders"]) == {"ours", "fused"}
    assert "Failed: foreach: RuntimeError: out of luck." in (tmp_path / "results.md").read_text()

    unlucky = ("ours",)
    code, output = bench("--suite", "ops", "--only", "adamw|dequantize-into", "--output-dir", tmp_path)
    assert code == 1 and "adamw" in output and "ours: RuntimeError: out of luck" in output
    found = json.loads((tmp_path / "results.json").read_text())
    assert [name.split()[0] for name in found["failed"]] == ["adamw"] and len(found["results"]) == 1


def test_a_contender_in_a_process_that_fails_leaves_the_others():
    def worker(function):
        return lambda: Worker(f"test_bench:{function}", 1, **({"mib": 8} if function == "allocate" else {}))

    steps = {name: worker(name) for name in ("allocate", "break_off")}
    row = cases.Case("w", {}, steps, base="allocate", processes=True).run(cases.Settings(rounds=1))
    assert set(row["contenders"]) == {"allocate"} and "the reason" in row["failed"]["break_off"]


def test_a_worker_whose_process_has_ended_says_why():
    with Worker("test_bench:break_off", 1) as worker:
        worker._process.wait()
        with pytest.raises(RuntimeError, match="the reason"):
            worker.ready()


def test_no_model_is_made_for_a_case_that_does_not_run(monkeypatch, tmp_path):
    monkeypatch.setattr(train, "make_model", lambda *_: pytest.fail("a model was made"))
    code, output = bench("--suite", "train", "--only", "nothing-like-it", "--output-dir", tmp_path)
    assert code == 2 and "no case of train has such a name" in output


@pytest.mark.parametrize("contender", sorted({*train.TRAIN, *train.FUSED, *(f"{name}-fused" for name in train.FUSED)}))
def test_a_step_of_each_trainer_runs(tmp_path, contender):
    for module in train.needs(contender):
        pytest.importorskip(module)
    directory = train.make_model(str(tmp_path), layers=1)
    step = train.train_step(contender, directory, batch=2, length=8, dtype="float32")
    step()
    step()
