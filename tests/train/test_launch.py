import os
import re
from pathlib import Path
from types import SimpleNamespace

import accelerate
import pytest
from accelerate import Accelerator
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType, DynamoBackend
from accelerate.utils.launch import prepare_multi_gpu_env
from places import run_python
from tiny_sft import read_metrics, settings, train_tiny

from lora_kernels.train.config import DPOConfig, PPOConfig, RewardConfig
from lora_kernels.train.dpo import run_dpo
from lora_kernels.train.launch import check_launcher
from lora_kernels.train.ppo.trainer import run_ppo
from lora_kernels.train.reward import run_reward
from lora_kernels.train.sft import run_sft

# One process sleeps for twice what a collective may take, once in each kind of wait, and last in a collective.
SLEEPING = """
import sys, time
from datetime import timedelta
import torch
from torch.distributed import distributed_c10d
from lora_kernels.train.launch import computed_together, make_accelerator, wait_for_everyone

accelerator = make_accelerator()
wait_for_everyone(accelerator)
distributed_c10d._set_pg_timeout(timedelta(seconds=2))
process = accelerator.process_index
for sleeper in (0, 1):
    time.sleep(4 * (process == sleeper))
    wait_for_everyone(accelerator)

def compute(rows):
    time.sleep(4 * (process == 1))
    return torch.tensor([[row, process] for row in rows])

found = computed_together(torch.zeros(5, 2, dtype=torch.int64), [[4, 1], [0], [2, 3]], compute, accelerator)
assert found.tolist() == [[0, 1], [1, 0], [2, 0], [3, 0], [4, 0]], found
try:
    time.sleep(4 * (process == 0))
    accelerator.wait_for_everyone()
except RuntimeError:
    sys.exit()
sys.exit("a collective waited as long")
"""


def test_processes_wait_for_one_that_takes_longer_than_a_collective_may(tmp_path):
    script = tmp_path / "sleeping.py"
    script.write_text(SLEEPING)
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    process = run_python(str(script), launcher=launcher)
    assert process.returncode == 0, process.stderr


def launch_environment(*flags):
    """The variables that `accelerate launch` adds for these flags."""
    arguments = [*flags, "--num_processes=2", "--num_machines=1", "--num_cpu_threads_per_process=1", "train.py"]
    arguments = _validate_launch_command(launch_command_parser().parse_args(arguments))[0]
    return {name: value for name, value in prepare_multi_gpu_env(arguments).items() if os.environ.get(name) != value}


@pytest.mark.parametrize(
    "flags, refused",
    [
        (["--use_fsdp"], "ACCELERATE_USE_FSDP is 'true'.*--use_fsdp"),
        (["--use_megatron_lm"], "ACCELERATE_USE_MEGATRON_LM is 'true'"),
        (["--use_fsdp", "--fsdp_version=2", "--use_parallelism_config"], "ACCELERATE_USE_(FSDP|PARALLELISM_CONFIG)"),
        (["--mixed_precision=fp16"], "ACCELERATE_MIXED_PRECISION is 'fp16'.*set dtype"),
        (["--dynamo_backend=inductor"], "ACCELERATE_DYNAMO_BACKEND is 'INDUCTOR'"),
        (["--mixed_precision=no", "--enable_cpu_affinity", "--debug"], None),
    ],
)
def test_launcher_flags_that_change_the_training_are_refused(monkeypatch, flags, refused):
    for name, value in launch_environment(*flags).items():
        monkeypatch.setenv(name, value)
    if refused is None:
        check_launcher()
    else:
        with pytest.raises(ValueError, match=refused):
            check_launcher()


def test_every_switch_of_accelerate_is_known(monkeypatch):
    source = "".join(path.read_text() for path in Path(accelerate.__file__).parent.rglob("*.py"))
    switches = set(re.findall(r"ACCELERATE_USE_[A-Z_]+", source))
    assert "ACCELERATE_USE_DEEPSPEED" in switches
    for name in switches:
        monkeypatch.setenv(name, "True")
        if name in ("ACCELERATE_USE_CPU", "ACCELERATE_USE_SAGEMAKER"):
            check_launcher()
        else:
            with pytest.raises(ValueError, match=f"{name} is 'True'"):
                check_launcher()
        monkeypatch.delenv(name)


@pytest.mark.parametrize(
    "run, config, more",
    [
        (run_sft, settings, {}),
        (run_dpo, DPOConfig, {}),
        (run_reward, RewardConfig, {}),
        (run_ppo, PPOConfig, {"reward": "x.py:f"}),
    ],
)
def test_refused_by_every_trainer_before_a_model_is_loaded(tmp_path, monkeypatch, run, config, more):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    if more:
        (tmp_path / "x.py").write_text("def f(prompts, responses): return [0.0] * len(prompts)")
        more = {"reward": f"{tmp_path / 'x.py'}:f"}
    with pytest.raises(ValueError, match="ACCELERATE_USE_FSDP"):
        run(config(output_dir=str(tmp_path / "out"), model="no/model", data="no/data", **more), progress=False)
    assert not (tmp_path / "out").exists()


def test_accumulation_that_accelerate_was_told_of_does_not_divide_gradients_again(tmp_path, monkeypatch):
    def first_norm(name, **options):
        train_tiny(tmp_path / name, max_steps=1, **options)
        return read_metrics(tmp_path / name)[0]["grad_norm"]

    expected = first_norm("plain")
    assert first_norm("own", accelerator=Accelerator(cpu=True, gradient_accumulation_steps=4)) == expected
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    with pytest.warns(UserWarning, match="STEPS=4 is not used: gradient_accumulation_steps of the settings decides"):
        assert first_norm("environment") == expected


@pytest.mark.parametrize(
    "changes, refused",
    [
        ({"distributed_type": DistributedType.FSDP}, "distributed_type FSDP"),
        ({"mixed_precision": "bf16"}, "mixed_precision 'bf16'"),
        ({"state": SimpleNamespace(dynamo_plugin=SimpleNamespace(backend=DynamoBackend.EAGER))}, "backend EAGER"),
        ({"distributed_type": DistributedType.MULTI_GPU}, None),
    ],
)
def test_accelerators_that_train_otherwise_are_refused(changes, refused):
    state = SimpleNamespace(dynamo_plugin=SimpleNamespace(backend=DynamoBackend.NO))
    accelerator = SimpleNamespace(
        **{"distributed_type": DistributedType.NO, "mixed_precision": "no", "state": state, **changes}
    )
    if refused is None:
        check_launcher(accelerator)
    else:
        with pytest.raises(ValueError, match=refused):
            check_launcher(accelerator)


def test_what_the_plots_need_is_tried_before_a_model_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "qt4agg")
    code = """
import sys
from lora_kernels.train.config import SFTConfig
from lora_kernels.train.sft import run_sft
run_sft(SFTConfig(model="no/model", data="no/data.json", output_dir=sys.argv[1]))
"""
    process = run_python(code, tmp_path / "out")
    assert process.returncode != 0 and "'qt4agg' is not a valid value for backend" in process.stderr
