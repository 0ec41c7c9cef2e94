"""Checkpoints and adapters on a full disk, after a crash at any moment, and with damaged files."""

import json
import os
import resource
import shutil
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from places import run_python
from tiny_chat import tiny_llama, tiny_tokenizer
from tiny_models import tiny_model
from tiny_ppo import data as data
from tiny_ppo import model_dir as model_dir
from tiny_ppo import run_for_resume
from tiny_sft import read_metrics, train_tiny
from torch import nn

from lora_kernels import load_adapter, save_adapter
from lora_kernels.files import (
    append,
    new_directory,
    replacing_files,
    write_json,
)
from lora_kernels.methods import adalora, full, inject
from lora_kernels.methods.lora import LoRAConfig
from lora_kernels.train.checkpoint import LoopState, find_checkpoint, load_state, save_checkpoint, weights_digest
from lora_kernels.train.metrics import truncate_metrics


@contextmanager
def file_limit(size):
    """No file may grow beyond `size` bytes, which every writer meets as it meets a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def everything(directory):
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


# A full disk


def save_full(directory):
    save_adapter(inject(tiny_llama(), full.FullConfig()), directory)


def save_tokenizer(directory):
    with replacing_files(directory, last="tokenizer_config.json") as staged:
        tiny_tokenizer().save_pretrained(staged)


def save_new(directory):
    with new_directory(directory / "new") as staged:
        tiny_llama().save_pretrained(staged)


WRITERS = {
    "adapter_model.safetensors": lambda directory: save_adapter(inject(tiny_llama(), LoRAConfig(r=8)), directory),
    "values.json": lambda directory: write_json(directory / "values.json", "x" * 10000),
    "": save_full,
    ".": save_tokenizer,
    "new": save_new,
}


@pytest.mark.parametrize("name", WRITERS)
def test_what_cannot_be_written_is_an_os_error_that_names_it_and_leaves_nothing(tmp_path, name):
    directory = tmp_path / "out"
    directory.mkdir()
    (directory / "adapter_model.safetensors").write_bytes(b"before")
    with pytest.raises(OSError, match=f"{directory}.*{name}") as raised, file_limit(4096):
        WRITERS[name](directory)
    assert "too large" in str(raised.value) and "Traceback" not in str(raised.value)
    assert everything(directory) == {"adapter_model.safetensors": b"before"}


def test_a_line_is_added_whole_or_not_at_all(tmp_path):
    append(tmp_path / "lines", "a" * 3000 + "\n")
    with pytest.raises(OSError, match="lines"), file_limit(4096):
        append(tmp_path / "lines", "b" * 3000 + "\n")
    append(tmp_path / "lines", "c\n")
    assert (tmp_path / "lines").read_text() == "a" * 3000 + "\nc\n"


@pytest.mark.parametrize(
    "size, named",
    [(16384, "out/adapter_model.safetensors"), (24576, "rng-0.json"), (40960, "training_state.safetensors")],
)
def test_a_full_disk_leaves_the_last_checkpoint_and_nothing_half_written(tmp_path, size, named):
    plan = {"max_steps": 6, "batch_size": 4, "save_steps": 2}
    train_tiny(tmp_path / "whole", **plan)
    limits = []

    def fill(record):
        if record["step"] == 4:
            limits.append(file_limit(size))
            limits[0].__enter__()

    try:
        with pytest.raises(OSError, match=f"{named}.*checkpoint-last holds the state before"):
            train_tiny(tmp_path / "out", callbacks=[fill], **plan)
    finally:
        limits[0].__exit__(None, None, None)
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "checkpoint-last",
        "config.yaml",
        "metrics.jsonl",
    ]
    assert load_state(tmp_path / "out/checkpoint-last", {}, LoopState)[0].step == 2
    train_tiny(tmp_path / "out", resume=True, **plan)
    for file in ("adapter_model.safetensors", "checkpoint-last/training_state.safetensors"):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "out" / file).read_bytes()


def test_where_another_process_fails_all_do_and_the_last_checkpoint_stays(tmp_path):
    model = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    save(tmp_path, model, optimizer, 1)
    before = everything(tmp_path)
    calls = []

    def reduce(tensor, how):
        calls.append(tensor.item())
        # The other one makes its directory, but can't write its file.
        return tensor + (len(calls) == 2)

    accelerator = SimpleNamespace(
        is_main_process=True,
        num_processes=1,
        process_index=0,
        device=torch.device("cpu"),
        reduce=reduce,
        wait_for_everyone=lambda: None,
    )
    with pytest.raises(OSError, match="another process could not write its part"):
        save(tmp_path, model, optimizer, 2, accelerator)
    assert calls == [0, 0] and everything(tmp_path) == before


FIRST_CANNOT_WRITE = """
import os, sys
from pathlib import Path
from tiny_sft import train_stoppable
from lora_kernels.train import loop
rank, out = int(os.environ["RANK"]), Path(sys.argv[1])
init, replace = loop.Loop.__init__, os.replace
def fail(*_):
    raise OSError("full")
def without_adapter(self, *arguments, **options):
    init(self, *arguments, **options)
    self.save_adapter = fail
def without_swap(source, target):
    (fail if Path(target).name == "checkpoint-last" else replace)(source, target)
def said(name, **changes):
    try:
        train_stoppable(out / name, gradient_accumulation_steps=1, batch_size=2, max_steps=2, **changes)
    except OSError as error:
        (out / f"{name}-{rank}").write_text(str(error))
loop.Loop.__init__ = without_adapter
said("best", eval_steps=1)
said("last", eval_steps=2)
loop.Loop.__init__, os.replace = init, without_swap
said("swap")
"""


def test_where_the_first_process_cannot_write_none_waits_for_it(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(FIRST_CANNOT_WRITE)
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    process = run_python(str(script), tmp_path, launcher=launcher)
    assert process.returncode == 0, process.stderr
    for name in ("best", "last", "swap"):
        said = [(tmp_path / f"{name}-{rank}").read_text() for rank in (0, 1)]
        assert said == ["full", "another process could not write its part"]
        assert not (tmp_path / name / "checkpoint-last").exists()


@pytest.mark.parametrize("tied", [False, True])
def test_the_digest_tells_layers_apart_by_their_order_not_by_their_names(tied):
    model = tiny_model("llama", tied).requires_grad_(False)
    before = weights_digest(model)
    assert weights_digest(nn.ModuleDict({"other": model, "head": model.lm_head})) == before
    first, second = (layer.mlp.up_proj for layer in model.model.layers)
    first.weight, second.weight = second.weight, first.weight
    assert weights_digest(model) != before


# A crash at any moment


class Crash(BaseException):
    """A process that is killed: nothing that changes names is done any more."""


@contextmanager
def crash_at(monkeypatch, call):
    """The renames and removals of directories from number `call` on are not done."""
    calls = 0

    def counted(function):
        def run(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls > call:
                raise Crash
            return function(*args, **kwargs)

        return run

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", counted(os.replace))
        patch.setattr(shutil, "rmtree", counted(shutil.rmtree))
        yield


def save(directory, model, optimizer, step, accelerator=None):
    parameters, accelerator = dict(model.named_parameters()), accelerator or Accelerator(cpu=True)
    adapter = lambda path: write_json(path / "adapter.json", step)  # noqa: E731
    save_checkpoint(directory, parameters, optimizer, LoopState(step=step), {}, accelerator, adapter)


def test_after_a_crash_at_any_moment_there_is_a_whole_checkpoint_the_newest(tmp_path, monkeypatch):
    model = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    found = []
    for call in range(30):
        directory = tmp_path / str(call)
        save(directory, model, optimizer, 1)
        crashed = True
        with crash_at(monkeypatch, call):
            try:
                save(directory, model, optimizer, 2)
                crashed = False
            except Crash:
                pass
        path = find_checkpoint(directory)
        step = load_state(path, {}, LoopState)[0].step
        assert json.loads((path / "adapter.json").read_text()) == step
        found.append(step)
        # What it left is no hindrance, and goes.
        save(directory, model, optimizer, 3)
        assert load_state(find_checkpoint(directory), {}, LoopState)[0].step == 3
        assert sorted(path.name for path in directory.iterdir()) == ["checkpoint-last"]
        if not crashed:
            break
    assert not crashed and found == sorted(found)
    # The last two are the crash at the removal of the old one, and none.
    assert found[-3:] == [1, 2, 2]


def test_with_two_checkpoints_it_is_the_newer(tmp_path):
    assert find_checkpoint(tmp_path) is None
    (tmp_path / ".checkpoint-last.old").mkdir()
    assert find_checkpoint(tmp_path) == tmp_path / ".checkpoint-last.old"
    (tmp_path / "checkpoint-last").mkdir()
    assert find_checkpoint(tmp_path) == tmp_path / "checkpoint-last"
    (tmp_path / ".checkpoint-last.tmp").mkdir()
    assert find_checkpoint(tmp_path) == tmp_path / "checkpoint-last"


@pytest.mark.parametrize(
    "config, complete",
    [
        (LoRAConfig(r=2), "adapter_config.json"),
        (adalora.AdaLoRAConfig(total_step=10), "adapter_config.json"),
        (full.FullConfig(), "config.json"),
    ],
)
def test_a_directory_with_a_config_is_complete(tmp_path, monkeypatch, config, complete):
    """After a crash at any rename, load_adapter gives the weights wherever there is a config."""
    model = inject(tiny_llama(), config)
    there = []
    for call in range(30):
        directory = tmp_path / str(call)
        crashed = True
        with crash_at(monkeypatch, call):
            try:
                save_adapter(model, directory)
                crashed = False
            except Crash:
                pass
        there.append((directory / complete).is_file())
        if there[-1]:
            load_adapter(tiny_llama(), directory)
        if not crashed:
            break
    assert there == sorted(there) and there[:2] == [False, False] and there[-1]


# Damaged files


DAMAGES = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "empty": lambda path: path.write_bytes(b""),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "other": lambda path: path.write_bytes(b"[1, 2]"),
    "missing": lambda path: path.unlink(),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of adalora, whose checkpoint has all files."""
    directory = tmp_path_factory.mktemp("trained")
    train_adalora(directory)
    return directory


def train_adalora(directory, **changes):
    torch.manual_seed(1)
    model = inject(tiny_llama(), adalora.AdaLoRAConfig(init_r=3, target_r=2))
    return train_tiny(directory, model=model, method="adalora", max_steps=2, batch_size=4, **changes)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(
    "name", ["training_state.safetensors", "training_state.json", "method_state.safetensors", "rng-0.json"]
)
def test_a_damaged_file_of_a_checkpoint_is_named(tmp_path, trained, name, damage):
    shutil.copytree(trained, tmp_path / "run")
    DAMAGES[damage](tmp_path / "run/checkpoint-last" / name)
    what = "missing" if damage == "missing" else "damaged"
    advice = "put a copy of .*checkpoint-last in its place, or remove it to start anew"
    with pytest.raises(ValueError, match=f"checkpoint-last/{name} is {what}.*; {advice}"):
        train_adalora(tmp_path / "run", resume=True)
    assert read_metrics(tmp_path / "run") == read_metrics(trained)


def test_a_damaged_checkpoint_of_ppo_is_named(tmp_path, model_dir, data):
    run_for_resume(tmp_path / "out", model_dir, data, max_steps=2)
    DAMAGES["cut"](tmp_path / "out/checkpoint-last/rng-0.json")
    with pytest.raises(ValueError, match=r"rng-0\.json is damaged"):
        run_for_resume(tmp_path / "out", model_dir, data, max_steps=2, resume=True)


def test_a_damaged_line_of_the_metrics_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for bad in ("{", "7", '{"loss": 1}', '{"step": "1"}'):
        path.write_text(f'{{"step": 1}}\n{bad}\n{{"step": 2}}\n')
        with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2, is damaged .*; mend it or take it out"):
            truncate_metrics(path, 2)
    path.write_bytes(b'{"step": 1}\n\xff\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl is damaged"):
        truncate_metrics(path, 2)
    # Lines after the checkpoint are dropped, whatever they hold, and so is a last one that was cut.
    for rest in ('{"step": 2}\n{\n{"step": 3}\n', '{"st', "\0\0\0"):
        path.write_text('{"step": 1}\n' + rest)
        truncate_metrics(path, 1)
        assert path.read_text() == '{"step": 1}\n'


def test_a_damaged_model_is_named(tmp_path):
    from lora_kernels.io.models import load_model

    tiny_llama().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    DAMAGES["cut"](tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=f"model directory {tmp_path} could not be loaded"):
        load_model(str(tmp_path))
