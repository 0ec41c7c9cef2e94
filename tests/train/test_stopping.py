import json
import os
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
from places import environment, run_python
from tiny_ppo import data as data
from tiny_ppo import model_dir as model_dir
from tiny_ppo import run_for_resume, steps_of
from tiny_sft import read_metrics, train_stoppable, train_tiny

from lora_kernels.train import compare, stopping
from lora_kernels.train.checkpoint import save_checkpoint
from lora_kernels.train.stopping import Stopper, ended_by_signals, handling

TIMINGS = ("tokens_per_second", "eval_seconds")
ONE_PROCESS = SimpleNamespace(num_processes=1, is_main_process=True)


def raise_at(number, step, times=1):
    """A callback that has this process get a signal when a record of the step is written."""

    def callback(record):
        if record["step"] == step:
            for _ in range(times):
                os.kill(os.getpid(), number)

    return callback


def state_of(output_dir):
    return json.loads((output_dir / "checkpoint-last" / "training_state.json").read_text())


def without_timings(output_dir):
    return [{k: v for k, v in record.items() if k not in TIMINGS} for record in read_metrics(output_dir)]


@pytest.mark.parametrize("number, ends", [("SIGTERM", 143), ("SIGHUP", 129), ("SIGINT", 130)])
@pytest.mark.parametrize("step", [2, 3, 6])
def test_a_signal_ends_the_run_after_the_step_and_it_goes_on_exactly(tmp_path, capfd, number, ends, step):
    train_stoppable(tmp_path / "whole")
    before = [signal.getsignal(each) for each in stopping._SIGNALS]
    with pytest.raises((KeyboardInterrupt, SystemExit)) as raised:
        train_stoppable(tmp_path / "stopped", callbacks=[raise_at(getattr(signal, number), step, times=2)])
    if number == "SIGINT":
        assert raised.type is KeyboardInterrupt
    else:
        assert raised.type is SystemExit and raised.value.code == ends
    assert [signal.getsignal(each) for each in stopping._SIGNALS] == before
    assert state_of(tmp_path / "stopped")["step"] == step
    said = capfd.readouterr().err.splitlines()
    assert said[-2] == f"{number}: stopping after this step; a second signal stops at once"
    assert said[-1].startswith(f"stopped by {number}; the same run with resume (--resume) goes on from {tmp_path}")
    train_stoppable(tmp_path / "stopped", resume=True)
    assert without_timings(tmp_path / "stopped") == without_timings(tmp_path / "whole")
    for file in ("adapter_model.safetensors", "checkpoint-last/training_state.safetensors"):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "stopped" / file).read_bytes()


def test_an_evaluation_that_a_signal_left_out_is_made_by_the_run_that_goes_on(tmp_path):
    """The log of step 6 comes before its evaluation, so that the stopped run ends without one."""
    with pytest.raises(SystemExit):
        train_stoppable(tmp_path, callbacks=[raise_at(signal.SIGTERM, 6)])
    assert [r["step"] for r in read_metrics(tmp_path) if "eval_loss" in r] == [3]
    assert state_of(tmp_path)["evaluation_due"]
    _, result = train_stoppable(tmp_path, resume=True)
    assert [r["step"] for r in read_metrics(tmp_path) if "eval_loss" in r] == [3, 6]
    assert result.eval_loss is not None and not state_of(tmp_path)["evaluation_due"]
    train_stoppable(tmp_path, resume=True)
    assert [r["step"] for r in read_metrics(tmp_path) if "eval_loss" in r] == [3, 6]


def test_ppo_stops_and_goes_on_exactly(tmp_path, model_dir, data):
    run_for_resume(tmp_path / "whole", model_dir, data)
    with pytest.raises(SystemExit) as raised:
        run_for_resume(tmp_path / "stopped", model_dir, data, callbacks=[raise_at(signal.SIGTERM, 3)])
    assert raised.value.code == 143
    assert state_of(tmp_path / "stopped")["step"] == 3
    run_for_resume(tmp_path / "stopped", model_dir, data, resume=True)
    whole, stopped = ([record["loss/policy"] for record in steps_of(tmp_path / n)] for n in ("whole", "stopped"))
    assert whole == stopped
    file = "checkpoint-last/training_state.safetensors"
    assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "stopped" / file).read_bytes()


def test_an_evaluation_of_ppo_that_a_signal_left_out_is_made_once(tmp_path, model_dir, data):
    plan = {"max_steps": 2, "eval_steps": 2}
    with pytest.raises(SystemExit):
        run_for_resume(tmp_path, model_dir, data, callbacks=[raise_at(signal.SIGTERM, 2)], **plan)
    for _ in range(2):
        run_for_resume(tmp_path, model_dir, data, resume=True, **plan)
        assert [r["step"] for r in read_metrics(tmp_path) if "eval_score" in r] == [0, 2]


@pytest.mark.parametrize("trainer", ["sft", "ppo"])
def test_a_signal_during_the_last_checkpoint_ends_the_run(tmp_path, monkeypatch, model_dir, data, trainer):
    def signalled(*arguments):
        save_checkpoint(*arguments)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("lora_kernels.train.trainer.save_checkpoint", signalled)
    with pytest.raises(SystemExit) as raised:
        if trainer == "sft":
            train_stoppable(tmp_path, max_steps=1)
        else:
            run_for_resume(tmp_path, model_dir, data, max_steps=1)
    assert raised.value.code == 143 and state_of(tmp_path)["step"] == 1


def test_a_second_signal_does_what_it_did_before(tmp_path):
    class Now(Exception):
        pass

    def before(number, frame):
        raise Now

    def twice(record):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(2 * stopping._SAME_REQUEST_SECONDS)
        os.kill(os.getpid(), signal.SIGTERM)

    old = signal.signal(signal.SIGTERM, before)
    try:
        with pytest.raises(Now):
            train_tiny(tmp_path, callbacks=[twice])
        assert signal.getsignal(signal.SIGTERM) is before
    finally:
        signal.signal(signal.SIGTERM, old)
    assert len(read_metrics(tmp_path)) == 1 and not (tmp_path / "checkpoint-last").exists()


def test_ignored_signals_stay_ignored():
    old = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with handling(lambda number, frame: None):
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, old)


def test_a_run_in_a_thread_leaves_signals_alone(tmp_path):
    found = []

    def look(record):
        found.append([signal.getsignal(number) for number in stopping._SIGNALS])

    before = [signal.getsignal(number) for number in stopping._SIGNALS]
    thread = threading.Thread(target=train_tiny, args=(tmp_path,), kwargs={"max_steps": 1, "callbacks": [look]})
    thread.start()
    thread.join()
    assert found == [before]
    assert state_of(tmp_path)["step"] == 1


@pytest.mark.parametrize("changes, saved", [({}, [2, 3, 4, 5, 6]), ({"save_steps": 100}, [6])])
def test_a_checkpoint_every_ten_minutes_unless_save_steps_is_given(tmp_path, monkeypatch, changes, saved):
    """An epoch of six steps, the first of one second and the others of eleven minutes each."""
    clock = [0.0]
    monkeypatch.setattr(stopping.time, "monotonic", lambda: clock[0])
    found = []

    def pass_time(record):
        if (tmp_path / "checkpoint-last").exists():
            found.append(state_of(tmp_path)["step"])
        clock[0] += 1 if record["step"] == 1 else 660

    train_tiny(tmp_path, batch_size=4, callbacks=[pass_time], **changes)
    assert sorted({*found, state_of(tmp_path)["step"]}) == saved


def test_no_checkpoint_before_ten_minutes(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(stopping.time, "monotonic", lambda: clock[0])
    stopper = Stopper(ONE_PROCESS, stopping.SAVE_SECONDS)
    with stopper:
        for now, overdue in ((599.0, False), (600.0, True)):
            clock[0] = now
            assert stopper.agreed() == (0, overdue)
        stopper.saved()
        assert stopper.agreed() == (0, False)


ONE_OF_TWO = """
import atexit, glob, os, signal, sys
import test_stopping as t
rank = int(os.environ["RANK"])
def name_of(path):
    try:
        return open(path).read()
    except OSError:  # it ended meanwhile
        return ""
def note_threads():
    names = [name_of(path) for path in glob.glob("/proc/self/task/*/comm")]
    open(f"{sys.argv[1]}-{rank}-threads", "w").write("".join(names))
atexit.register(note_threads)
from lora_kernels.train import loop
step = loop.Loop._step
def signalled(self):
    step(self)
    if rank == 1 and self.state.step == 2:
        os.kill(os.getpid(), signal.SIGTERM)
loop.Loop._step = signalled
try:
    t.train_stoppable(sys.argv[1], gradient_accumulation_steps=1, batch_size=2, max_steps=6)
except SystemExit as error:
    open(f"{sys.argv[1]}-{rank}", "w").write(str(error.code))
"""


def test_a_signal_for_one_process_ends_all_at_the_same_step(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(ONE_OF_TWO)
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    process = run_python(str(script), tmp_path / "out", launcher=launcher)
    assert process.returncode == 0, process.stderr
    assert [(tmp_path / f"out-{rank}").read_text() for rank in (0, 1)] == ["143", "143"]
    assert state_of(tmp_path / "out")["step"] == 2
    assert sorted(path.name for path in (tmp_path / "out/checkpoint-last").glob("rng-*")) == [
        "rng-0.json",
        "rng-1.json",
    ]
    assert process.stderr.count("stopped by SIGTERM") == 1
    # A thread of gloo that frees a tensor while the interpreter ends aborts the process.
    assert not any("gloo" in (tmp_path / f"out-{rank}-threads").read_text() for rank in (0, 1))


BEFORE_THE_FIRST_STEP = """
import os, signal, sys
from lora_kernels.cli.commands import app
def run_sft(settings):
    os.kill(os.getpid(), getattr(signal, sys.argv[1]))
    signal.pause()
import lora_kernels.train.sft
lora_kernels.train.sft.run_sft = run_sft
app(["sft", "--model", "m", "--data", "d", "--output-dir", sys.argv[2]])
"""


@pytest.mark.parametrize("number, ends", [("SIGTERM", 143), ("SIGHUP", 129), ("SIGINT", 130)])
def test_a_command_ends_with_128_and_the_signal_before_its_first_step_too(tmp_path, number, ends):
    process = run_python(BEFORE_THE_FIRST_STEP, number, tmp_path)
    assert process.returncode == ends
    assert process.stderr.splitlines()[-1] == f"stopped by {number}; nothing is saved yet"
    (tmp_path / "checkpoint-last").mkdir()
    with pytest.raises(SystemExit) as raised, ended_by_signals(tmp_path):
        os.kill(os.getpid(), getattr(signal, number))
        time.sleep(1)
    assert raised.value.code == ends


@pytest.mark.parametrize("rank, times", [(0, 1), (1, 0)])
def test_of_several_processes_the_first_says_that_they_were_stopped(tmp_path, monkeypatch, rank, times):
    monkeypatch.setenv("RANK", str(rank))
    process = run_python(BEFORE_THE_FIRST_STEP, "SIGTERM", tmp_path)
    assert process.returncode == 143 and process.stderr.count("stopped by SIGTERM") == times


@pytest.mark.parametrize("number", ["SIGTERM", "SIGINT"])
@pytest.mark.parametrize("child", ["import time; time.sleep(60)", ""])
def test_a_signal_ends_compare_where_its_run_knows_nothing_of_it(tmp_path, monkeypatch, number, child):
    """It comes while the run still imports, or when it has just ended."""
    number = getattr(signal, number)

    class Popen(subprocess.Popen):
        def __init__(self, command):
            super().__init__([sys.executable, "-c", child])

        def wait(self):
            if not child:
                super().wait()
            os.kill(os.getpid(), number)
            return super().wait()

    monkeypatch.setattr(compare.subprocess, "Popen", Popen)
    with pytest.raises(SystemExit) as raised:
        compare._run_in_process("lora", {"config": {"output_dir": str(tmp_path)}})
    assert raised.value.code == 128 + number


LAUNCHED = """
import os, sys, time
from lora_kernels.train.stopping import ended_by_signals
try:
    with ended_by_signals(sys.argv[1]):
        open(sys.argv[1] + "/ready", "w").close()
        time.sleep(60)
except SystemExit as error:
    with open(sys.argv[1] + "/code.tmp", "w") as file:
        file.write(str(error.code))
    os.replace(sys.argv[1] + "/code.tmp", sys.argv[1] + "/code")
"""
LAUNCHER = "import subprocess, sys; subprocess.run([sys.executable, *sys.argv[1:]])"


def wait_for(path):
    deadline = time.monotonic() + 60
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    return path.exists()


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_a_run_ends_with_the_launcher_of_accelerate(tmp_path):
    """It starts one process as its child, and dies by a signal without passing it on."""
    command = [sys.executable, "-c", LAUNCHER, "-c", LAUNCHED, str(tmp_path)]
    launcher = subprocess.Popen(command, env=environment(ACCELERATE_DYNAMO_MODE="default"))
    try:
        assert wait_for(tmp_path / "ready")
    finally:
        launcher.terminate()
        launcher.wait()
    assert wait_for(tmp_path / "code") and (tmp_path / "code").read_text() == "143"
