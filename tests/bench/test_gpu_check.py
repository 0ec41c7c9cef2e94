"""benchmarks/gpu_check.py without a GPU: all that doesn't need one, and that it survives what fails."""

import json
import subprocess
import sys

import pytest
import torch
from places import ROOT

BENCHMARKS = ROOT / "benchmarks"


def gpu_check(work, *options):
    command = [sys.executable, str(BENCHMARKS / "gpu_check.py"), "--output-dir", str(work), *options]
    result = subprocess.run(command, capture_output=True, text=True, cwd=BENCHMARKS)
    return result.returncode, result.stdout, json.loads((work / "result.json").read_text())["results"]


def test_dry(tmp_path):
    pytest.importorskip("matplotlib")
    pytest.importorskip("peft")
    only = ["tests", "dense", "nf4", "kernels", "rounding", "steps", "memcheck", "plot"]
    code, output, report = gpu_check(tmp_path, "--dry", "--only", *only)
    assert code == 0, output
    assert report["build"]["status"] == "skipped: not asked for"
    for stage in ("tests", "dense", "nf4", "rounding", "steps", "plot"):
        assert report[stage]["status"] == "ok", output
    assert all(report[stage]["status"].startswith("skipped: ") for stage in ("memcheck", "kernels"))
    rows = report["dense"]["result"]["rows"]
    assert len(rows) == 4 and all(not row["failed"] for row in rows), output
    assert all({"bare", "ours", "addmm", "peft"} == set(row["contenders"]) for row in rows)
    assert {"triton", "cuda", "vendor", "unsloth"} == set(report["dense"]["result"]["skipped"])
    assert all("ours" in row["contenders"] for row in report["nf4"]["result"]["rows"])
    arrived = report["rounding"]["result"]["32 x 48 x 64"]
    assert {"ours", "addmm", "addmm, the term first", "peft"} == set(arrived) and abs(arrived["ours"] - 1) < 0.2
    steps = report["steps"]["result"]["tiny"]
    assert all("tokens_per_s" in steps[name] for name in ("frozen", "ours-lora", "ours-qlora", "peft-lora")), steps
    assert (tmp_path / "result.png").read_bytes().startswith(b"\x89PNG")
    assert "killed" not in output and output.rstrip().splitlines()[-1].startswith("written: ")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_stage_that_fails_is_reported_and_the_rest_goes_on(tmp_path):
    code, output, report = gpu_check(tmp_path, "--only", "environment", "plot")
    assert code == 1
    assert report["environment"]["status"] == "failed with status 1" and "torch sees no GPU here" in output
    assert report["plot"]["status"] == "skipped: there are no times"


@pytest.fixture
def module(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu_check

    return gpu_check


def test_a_stage_past_its_limit_is_killed_and_what_it_saved_is_kept(module, tmp_path, monkeypatch):
    script = tmp_path / "stage.py"
    script.write_text(
        "import sys, time\n"
        f"open({str(tmp_path / 'dense.json')!r}, 'w').write('{{\"rows\": []}}')\n"
        "print('working', flush=True)\n"
        "time.sleep(60)\n"
    )
    monkeypatch.setattr(module, "__file__", str(script))
    outcome = module.run_in_process("dense", tmp_path, True, 3.0)
    assert outcome["status"] == "killed after 3 s" and outcome["seconds"] < 30
    assert outcome["result"] == {"rows": []} and outcome["tail"] == ["working"]


def test_a_contender_that_fails_is_a_result(module, tmp_path, monkeypatch, capsys):
    make_step = module.make_step

    def broken(contender, *args):
        if contender == "ours":
            raise RuntimeError("misaligned address")
        return make_step(contender, *args)

    monkeypatch.setattr(module, "make_step", broken)
    monkeypatch.setattr(module, "why_not", lambda name, *_: None if name in ("bare", "ours", "addmm") else "not here")
    result = module.run_timings("dense", tmp_path, True, float("inf"))
    assert all(row["failed"] == {"ours": "RuntimeError: misaligned address"} for row in result["rows"])
    module.print_times("dense", result)
    assert "ours failed in 4 of 4 rows, the last time: RuntimeError: misaligned address" in capsys.readouterr().out
    result = module.run_timings("dense", tmp_path, True, deadline=0)
    assert result["left_out"] == "time ran out: the last 4 of 4 rows"


def test_mean_ratio(module):
    rows = [{"M": 1, "contenders": {"ours": {"ratio": ratio}}} for ratio in (1.0, 4.0)] + [{"M": 2, "contenders": {}}]
    assert module.mean_ratio(rows, "ours", M=1) == pytest.approx(2.0)
    assert module.mean_ratio(rows, "ours", M=2) is None
