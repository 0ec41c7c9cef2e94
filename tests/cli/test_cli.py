"""The command line from end to end on a tiny model, its errors, batched generation, and the demo's data."""

import dataclasses
import importlib.util
import json
import re
import shutil
import signal
import subprocess
import sys

import gguf
import pytest
import torch
import yaml
from places import ROOT
from tiny_models import tiny_model
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from lora_kernels import LoRAConfig, PromptConfig, inject, save_adapter
from lora_kernels.cli import not_installed
from lora_kernels.cli.commands import app
from lora_kernels.models.generate import generate, stop_tokens, turn_end
from lora_kernels.train.compare import plan
from lora_kernels.train.config import DPOConfig, PPOConfig, RewardConfig, SFTConfig, described

EXAMPLES = ROOT / "examples"
TEMPLATE = (
    "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] + '<end>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
CONFIGS = {"sft": SFTConfig, "dpo": DPOConfig, "reward": RewardConfig, "ppo": PPOConfig}
ANSWERS = {"red": "stop", "green": "go", "amber": "wait"}


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A random two-layer Llama with a byte-level tokenizer, and data it can learn by heart."""
    directory = tmp_path_factory.mktemp("tiny")
    special = ["<pad>", "<end>", "<user>", "<assistant>"]
    tokens = special + sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(special)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<end>", pad_token="<pad>", chat_template=TEMPLATE
    )
    tokenizer.save_pretrained(directory / "model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokens), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, eos_token_id=1, pad_token_id=0, bos_token_id=None,
        initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(directory / "model")
    records = [{"instruction": question, "output": answer} for question, answer in ANSWERS.items()]
    (directory / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records * 4))
    return directory


@pytest.fixture(scope="module")
def trained(tiny):
    """An adapter trained through the command line, settings half from YAML and half from flags."""
    settings = {"model": str(tiny / "model"), "data": str(tiny / "data.jsonl"), "lr": 1e-4, "r": 8, "max_steps": 60}
    (tiny / "run.yaml").write_text(yaml.safe_dump(settings))
    output = tiny / "adapter"
    result = run(
        "sft", "--config", tiny / "run.yaml", "--output-dir", output, "--lr", "0.02", "--batch-size", 12, "--dtype",
        "float32", "--eval-data", tiny / "data.jsonl", "--eval-steps", 30,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    return output


def test_sft_writes_its_run(trained, tiny):
    config = yaml.safe_load((trained / "config.yaml").read_text())
    assert config["lr"] == 0.02 and config["r"] == 8 and config["batch_size"] == 12 and config["max_steps"] == 60
    metrics = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in metrics if "loss" in record]
    assert losses[0] > 4 and losses[-1] < 0.2
    assert (trained / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((trained / "adapter_config.json").read_text())["r"] == 8
    again = run("sft", "--model", tiny / "model", "--data", tiny / "data.jsonl", "--output-dir", trained)
    assert again.exit_code == 2 and "holds another run" in again.stderr


def test_who_stops_a_run_is_told_how_to_go_on(tmp_path, monkeypatch, capfd):
    def stopped(settings):
        signal.raise_signal(signal.SIGINT)

    arguments = ("--model", "m", "--data", "d", "--output-dir", tmp_path)
    for command in ("sft", "reward", "dpo", "ppo"):
        module = "ppo.trainer" if command == "ppo" else command
        monkeypatch.setattr(f"lora_kernels.train.{module}.run_{command}", stopped)
        result = run(command, *arguments, *(("--reward", "r.py:f") if command == "ppo" else ()))
        assert result.exit_code == 130 and "nothing is saved yet" in capfd.readouterr().err
    (tmp_path / "checkpoint-last").mkdir()
    result = run("sft", *arguments)
    assert result.exit_code == 130 and "with resume (--resume) goes on from" in capfd.readouterr().err


@pytest.mark.parametrize("variable", ["RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK"])
def test_only_the_first_process_says_what_all_have_to_say(tmp_path, monkeypatch, variable):
    import warnings

    from lora_kernels.cli import commands

    def warned(settings):
        # pytest shows warnings itself; this is what Python would print.
        print(warnings.formatwarning("something", UserWarning, "file", 1), end="")
        if settings.seed:
            raise ValueError("a bad one")

    waited = []
    monkeypatch.setattr(commands.time, "sleep", waited.append)
    monkeypatch.setattr("lora_kernels.train.sft.run_sft", warned)
    arguments = ("sft", "--model", "m", "--data", "d", "--output-dir", tmp_path)
    for rank in ("0", "1"):
        monkeypatch.setenv(variable, rank)
        ended, failed = run(*arguments), run(*arguments, "--seed", 1)
        first = rank == "0"
        assert ended.output == (f"warning: something\nadapter, metrics and loss curve: {tmp_path}\n" if first else "")
        assert failed.stderr == ("error: a bad one\n" if first else "error: process 1: a bad one\n")
        assert failed.stdout == ("warning: something\n" if first else "")
        assert failed.exit_code == 2
    # A launcher ends the others when the first has failed.
    assert waited == [commands._SAME_ERROR_SECONDS]


def test_an_output_directory_that_cannot_be_written_is_found_before_the_model_is_loaded(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    arguments = ("sft", "--model", tmp_path / "no-model", "--data", "d", "--output-dir")
    for output in ("file", "file/run"):
        assert f"{tmp_path / 'file'} is a file" in run(*arguments, tmp_path / output).stderr
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert f"{tmp_path} can't be written to" in run(*arguments, tmp_path / "new" / "run").stderr


@pytest.mark.parametrize("command", ["reward", "dpo"])
def test_reward_and_dpo_write_their_runs(tiny, tmp_path, command):
    pairs = [{"prompt": name, "chosen": answer, "rejected": answer[::-1]} for name, answer in ANSWERS.items()]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    arguments = ("--model", tiny / "model", "--data", tmp_path / "pairs.jsonl", "--max-steps", 2, "--r", 4)
    own = ("--center-coef", 0.01) if command == "reward" else ("--loss", "ipo", "--no-precompute-ref")
    result = run(command, *arguments, *own, "--output-dir", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert str(tmp_path / "out") in result.stdout
    settings = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())
    assert settings["center_coef"] == 0.01 if command == "reward" else not settings["precompute_ref"]
    assert (tmp_path / "out" / "rewards.png").is_file() == (command == "reward")
    result = run(command, *arguments, "--method", "none", "--output-dir", tmp_path / "other")
    assert result.exit_code == 2 and "method must be one of" in result.stderr


def test_generate_answers_as_trained(trained, tiny):
    for question, answer in ANSWERS.items():
        result = run("generate", "--adapter", trained, "--prompt", question, "--max-new-tokens", 8)
        assert result.exit_code == 0, result.output
        assert result.stdout == answer + "\n"
    untrained = run("generate", "--model", tiny / "model", "--prompt", "red", "--max-new-tokens", 8)
    assert untrained.exit_code == 0 and untrained.stdout != "stop\n"


def test_generate_reads_prompts_from_files(trained, tiny, tmp_path):
    (tmp_path / "prompts.txt").write_text("red\n\namber\n")
    result = run(
        "generate", "--model", tiny / "model", "--adapter", trained, "--prompts-file", tmp_path / "prompts.txt",
        "--prompt", "green", "--max-new-tokens", 8, "--output", tmp_path / "answers.jsonl",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    records = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert records == [{"prompt": name, "answer": ANSWERS[name]} for name in ("green", "red", "amber")]
    result = run("generate", "--adapter", trained, "--prompts-file", tiny / "data.jsonl", "--max-new-tokens", 8)
    records = [json.loads(line) for line in result.stdout.splitlines()]
    assert records == [{"prompt": name, "answer": answer} for name, answer in ANSWERS.items()] * 4


def test_merge_writes_a_plain_model(trained, tiny, tmp_path):
    result = run("merge", "--model", tiny / "model", "--adapter", trained, "--output", tmp_path / "merged")
    assert result.exit_code == 0, result.output
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert type(model) is LlamaForCausalLM and tokenizer.chat_template == TEMPLATE
    assert generate(model, tokenizer, list(ANSWERS), max_new_tokens=8) == list(ANSWERS.values())

    from peft import PeftModel

    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny / "model"), trained).eval()
    ids = torch.arange(5, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, adapted(ids).logits, rtol=1e-4, atol=1e-4)

    again = run("merge", "--model", tiny / "model", "--adapter", trained, "--output", tmp_path / "merged")
    assert again.exit_code == 2 and "exists and is not empty" in again.stderr


def test_export_writes_an_adapter_its_merged_model_and_the_base_for_llama_cpp(trained, tiny, tmp_path):
    files = {name: tmp_path / f"{name}.gguf" for name in ("adapter", "merged", "base")}
    arguments = {
        "adapter": ("--model", tiny / "model", "--adapter", trained),
        "merged": ("--adapter", trained, "--merge"),
        "base": ("--model", tiny / "model", "--dtype", "float16"),
    }
    for name, file in files.items():
        result = run("export", "--gguf", file, *arguments[name])
        assert result.exit_code == 0, result.output
        assert result.stdout == f"{'adapter' if name == 'adapter' else 'model'} for llama.cpp: {file}\n"
    assert gguf.GGUFReader(files["adapter"]).fields["general.type"].contents() == "adapter"
    assert gguf.GGUFReader(files["base"]).tensors[0].tensor_type.name == "F16"
    merged = gguf.GGUFReader(files["merged"])
    assert merged.fields["tokenizer.chat_template"].contents() == TEMPLATE
    tokenizer = AutoTokenizer.from_pretrained(tiny / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="merged.gguf").eval()
    assert generate(model, tokenizer, list(ANSWERS), max_new_tokens=8) == list(ANSWERS.values())


def test_export_writes_a_fully_trained_model_as_it_is(tiny, tmp_path):
    result = run("export", "--gguf", tmp_path / "model.gguf", "--adapter", tiny / "model", "--dtype", "q8_0")
    assert result.exit_code == 0, result.output
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert types["token_embd.weight"] == "Q8_0" and types["output_norm.weight"] == "F32"
    result = run("export", "--gguf", tmp_path / "other.gguf", "--adapter", tiny / "model", "--merge")
    assert result.exit_code == 2 and "--merge needs an adapter" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


def test_generate_uses_the_template_the_adapter_was_trained_with(trained, tmp_path):
    for file in trained.glob("adapter_*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    # Turns "Q: red" into the "red" that the model knows; the model's own template would not.
    template = "<user>{{ messages[0]['content'] | replace('Q: ', '') }}<end><assistant>"
    (tmp_path / "chat_template.jinja").write_text(template)
    result = run("generate", "--adapter", tmp_path, "--prompt", "Q: red", "--max-new-tokens", 8)
    assert result.exit_code == 0, result.output
    assert result.stdout == "stop\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sft"], "missing field 'model', 'data'"),
        (["sft", "--model", "m", "--data", "d", "--backend", "gpu"], "backend is 'gpu'; allowed: auto, reference"),
        (["sft", "--model", "m", "--data", "d", "--lr", "-1"], "lr must be > 0, got -1.0"),
        (["sft", "--config", "absent.yaml"], "config file absent.yaml does not exist"),
        (["sft", "--model", "./absent", "--data", "a.jsonl"], "data file a.jsonl does not exist"),
        (["generate", "--model", "./absent", "--prompt", "x"], "model ./absent: no such directory"),
        (["generate", "--prompt", "x"], "give --model, --adapter, or both"),
        (["generate", "--model", "./absent"], "no prompt: give --prompt or --prompts-file"),
        (["generate", "--prompt", "x", "--adapter", "absent"], "absent has no adapter_config.json"),
        (["merge", "--adapter", "absent", "--output", "out"], "absent has no adapter_config.json"),
        (["export", "--gguf", "out"], "give --model, --adapter, or both"),
        (["export", "--gguf", "out", "--model", "m", "--dtype", "q4_0"], "dtype is 'q4_0'; allowed for GGUF: stored"),
        (["export", "--gguf", "out", "--model", "m", "--merge"], "--merge needs an adapter"),
    ],
)
def test_user_errors_are_one_line(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_bad_data_names_file_and_line(tiny, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"instruction": "a", "output": "b"}\n{"instruction": 3, "output": "b"}\n')
    result = run("sft", "--model", tiny / "model", "--data", tmp_path / "bad.jsonl", "--output-dir", tmp_path / "run")
    assert result.exit_code == 2 and "bad.jsonl:2" in result.stderr and result.stderr.count("error: ") == 1


def test_flags_override_yaml(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("lora_kernels.train.sft.run_sft", seen.append)
    text = "model: m\ndata: d\nlr: 3e-4\nr: 4\nresume: true\nuse_rslora: true\ntarget: [q_proj, v_proj]\n"
    (tmp_path / "run.yaml").write_text(text)
    result = run("sft", "--config", tmp_path / "run.yaml", "--r", 2, "--no-resume", "--output-dir", "o")
    assert result.exit_code == 0, result.output
    expected = SFTConfig(
        model="m", data="d", lr=3e-4, r=2, resume=False, use_rslora=True, target=["q_proj", "v_proj"], output_dir="o"
    )
    assert seen == [expected]


def test_data_may_be_given_again_or_as_a_list(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("lora_kernels.train.sft.run_sft", seen.append)
    (tmp_path / "run.yaml").write_text("model: m\ndata: [a.jsonl, b]\neval_data: c.jsonl\n")
    for arguments in (
        ("--config", tmp_path / "run.yaml"),
        ("--model", "m", "--data", "a.jsonl", "--data", "b", "--eval-data", "c.jsonl"),
    ):
        result = run("sft", *arguments)
        assert result.exit_code == 0, result.output
    assert seen == [SFTConfig(model="m", data=["a.jsonl", "b"], eval_data="c.jsonl")] * 2
    assert seen[0].identity == SFTConfig(model="m", data="elsewhere").identity
    seen[0].save_yaml(tmp_path / "saved.yaml")
    assert SFTConfig.from_yaml(tmp_path / "saved.yaml") == seen[0]


def test_traceback_on_request(monkeypatch):
    monkeypatch.setenv("LORA_KERNELS_TRACEBACK", "1")
    result = run("sft")
    assert isinstance(result.exception, ValueError)


def test_unknown_yaml_name(tmp_path):
    (tmp_path / "run.yaml").write_text("model: m\ndata: d\nlearning_rate: 1\n")
    result = run("sft", "--config", tmp_path / "run.yaml")
    assert result.exit_code == 2 and "unknown field 'learning_rate'" in result.stderr


@pytest.mark.parametrize("command, config", CONFIGS.items())
def test_every_setting_has_a_flag_a_help_text_and_a_line_in_the_docstring(command, config):
    output = " ".join(run(command, "--help").output.split())
    for field in dataclasses.fields(config):
        panel, text, _ = described(config, field.name)
        has_flag = f"--{field.name.replace('_', '-')} " in output
        is_documented = f"\n{field.name}: {text}" in config.__doc__
        assert panel and text and has_flag == is_documented == (field.name not in config.unused), field.name
    assert "Default: 0.03." in output and "Optimisation" in output


def test_doctor_shows_every_backend():
    from lora_kernels.backends import available

    result = run("doctor")
    assert result.exit_code == 0
    lines = [line.split() for line in result.output.splitlines()]
    for name, reason in available().items():
        assert [name, *(["yes"] if reason is None else ["no", *reason.split()])] in lines
    assert torch.__version__ in result.output


def test_the_package_runs_as_the_command_line():
    printed = [
        subprocess.run([sys.executable, "-m", module, "--help"], capture_output=True, text=True, check=True).stdout
        for module in ("lora_kernels", "lora_kernels.cli")
    ]
    package, cli = (" ".join(text.split()) for text in printed)
    assert package.replace("lora_kernels ", "lora_kernels.cli ") == cli
    assert "doctor" in package


INSTALL = "is not installed: pip install 'lora-kernels[train]'"


def without(packages, *command):
    """The command line's result in a process where `packages` can't be imported."""
    code = f"""
import runpy, sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {set(packages)!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
sys.argv = {["lora-kernels", *map(str, command)]!r}
runpy.run_module("lora_kernels.cli", run_name="__main__")
"""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def imported_as(requirement):
    name = re.match(r"[\w-]+", requirement)[0]
    return {"pyyaml": "yaml"}.get(name, name)


@pytest.fixture(scope="module")
def extra():
    """The packages of the extra `train`, as Python imports them."""
    requirements = re.search(r"^train = \[(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.S | re.M)[1]
    return {imported_as(requirement) for requirement in re.findall(r'"(.+?)"', requirements)}


def test_the_extra_is_known_by_its_packages(extra):
    assert {"typer", "yaml", "transformers"} <= extra
    for package in extra:
        error = ModuleNotFoundError(f"No module named '{package}.part'", name=f"{package}.part")
        assert not_installed(error) == f"the Python package {package} {INSTALL}"
    assert not_installed(ModuleNotFoundError("No module named 'mine'", name="mine")) is None


@pytest.mark.parametrize("command", [(), ("--help",), ("sft", "--model", "m", "--data", "d"), ("no-such-command",)])
def test_one_line_says_what_to_install_where_the_extra_is_missing(extra, command):
    result = without(extra, *command)
    assert result.returncode == 2 and result.stdout == ""
    assert re.fullmatch(
        r"error: .*(typer|yaml) is not installed: pip install 'lora-kernels\[train\]' "
        r"\(`lora-kernels doctor` works without it\)\n",
        result.stderr,
    )


def test_doctor_needs_no_extra(extra):
    result = without(extra | {"tokenizers", "huggingface_hub", "triton"}, "doctor")
    assert result.returncode == 0 and result.stderr == ""
    lines = [line.split() for line in result.stdout.splitlines()]
    assert ["reference", "yes"] in lines and ["torch", torch.__version__] in lines


def test_one_line_says_which_package_a_command_lacks(tmp_path, tiny):
    arguments = ("sft", "--model", tiny / "model", "--data", tiny / "data.jsonl", "--output-dir", tmp_path / "out")
    for package in ("transformers", "accelerate"):
        result = without({package}, *arguments)
        assert result.returncode == 2, result.stderr
        assert f"error: the Python package {package} {INSTALL}" in result.stderr
        assert "Traceback" not in result.stderr


def test_help_does_not_import_torch():
    code = (
        "import sys; from typer.testing import CliRunner; from lora_kernels.cli.commands import app; "
        "assert CliRunner().invoke(app, ['sft', '--help']).exit_code == 0; "
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_generate_equals_token_by_token_decoding(tiny):
    model = AutoModelForCausalLM.from_pretrained(tiny / "model")
    tokenizer = AutoTokenizer.from_pretrained(tiny / "model")
    tokenizer.padding_side = "right"
    prompts = ["a", "a much longer prompt", [{"role": "user", "content": "two"}, {"role": "assistant", "content": "2"},
                                             {"role": "user", "content": "x"}], "bcd"]  # fmt: skip
    model.train()
    answers = generate(model, tokenizer, prompts, max_new_tokens=6, batch_size=3)
    assert model.training and tokenizer.padding_side == "right"
    model.eval()
    for prompt, answer in zip(prompts, answers, strict=True):
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        text = "".join(f"<{turn['role']}>{turn['content']}<end>" for turn in turns) + "<assistant>"
        ids = tokenizer(text, add_special_tokens=False).input_ids
        start = len(ids)
        with torch.no_grad():
            while len(ids) < start + 6 and (len(ids) == start or ids[-1] != tokenizer.eos_token_id):
                ids.append(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax().item())
        assert answer == tokenizer.decode(ids[start:], skip_special_tokens=True)


def test_generate_stops_at_the_model_s_own_end_of_turn(tiny):
    model = AutoModelForCausalLM.from_pretrained(tiny / "model")
    tokenizer = AutoTokenizer.from_pretrained(tiny / "model")
    ids = tokenizer("<user>a<end><assistant>", add_special_tokens=False, return_tensors="pt").input_ids
    first = model(ids).logits[0, -1].argmax().item()
    assert generate(model, tokenizer, ["a"], max_new_tokens=6) != [""]
    model.generation_config.eos_token_id = [first, tokenizer.eos_token_id]
    assert generate(model, tokenizer, ["a"], max_new_tokens=6) == [""]


def test_the_end_of_a_turn_in_the_chat_template_ends_an_answer(tiny, tmp_path):
    """As in base models, whose tokenizer and generation config know another end token; also once merged."""
    model = AutoModelForCausalLM.from_pretrained(tiny / "model")
    tokenizer = AutoTokenizer.from_pretrained(tiny / "model")
    assert stop_tokens(model, tokenizer) == {tokenizer.eos_token_id}
    tokenizer.eos_token = "<pad>"
    model.generation_config.eos_token_id = 0
    assert stop_tokens(model, tokenizer) == {0, 1} and turn_end(tokenizer) == 1
    assert stop_tokens(model, tokenizer, TEMPLATE.replace("<end>", "<user>")) == {0, 2}
    assert turn_end(tokenizer, TEMPLATE.replace("<end>", "")) is None
    assert turn_end(tokenizer, "{{ raise_exception('no') }}") is None
    assert tokenizer.chat_template == TEMPLATE
    tokenizer.chat_template = None
    assert turn_end(tokenizer) is None
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path / "model")
    model.save_pretrained(tmp_path / "model")
    save_adapter(inject(model, LoRAConfig(r=2)), tmp_path / "adapter")
    result = run(
        "merge", "--model", tmp_path / "model", "--adapter", tmp_path / "adapter", "--output", tmp_path / "out"
    )
    assert result.exit_code == 0, result.output
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").generation_config.eos_token_id == [0, 1]


def test_a_pad_token_that_the_embedding_does_not_have(tiny):
    model = AutoModelForCausalLM.from_pretrained(tiny / "model")
    tokenizer = AutoTokenizer.from_pretrained(tiny / "model")
    expected = generate(model, tokenizer, ["a", "a longer one"], max_new_tokens=6)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id >= model.get_input_embeddings().num_embeddings
    assert generate(model, tokenizer, ["a", "a longer one"], max_new_tokens=6) == expected


def test_learned_positions_are_not_exceeded(tiny):
    tokenizer = AutoTokenizer.from_pretrained(tiny / "model")
    model, template = tiny_model("gpt2"), "{{ messages[0]['content'] }}"
    for virtual in (0, 8):
        if virtual:
            inject(model, PromptConfig(num_virtual_tokens=virtual))
        most = 64 - virtual - 5 + 1
        generate(model, tokenizer, ["!!!!!"], max_new_tokens=most, chat_template=template)
        with pytest.raises(ValueError, match=rf"max_new_tokens is {most + 1}; .* exceeds the 64 positions"):
            generate(model, tokenizer, ["!!!!!"], max_new_tokens=most + 1, chat_template=template)


def test_generate_samples_from_the_seed(tiny):
    model = AutoModelForCausalLM.from_pretrained(tiny / "model")
    tokenizer = AutoTokenizer.from_pretrained(tiny / "model")
    draws = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        draws.append(generate(model, tokenizer, ["a", "b"], max_new_tokens=12, temperature=1.0))
    assert draws[0] == draws[1] != draws[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"top_p": 0.0}, "top_p is 0.0"),
    ],
)
def test_generate_refuses_what_is_out_of_range(tiny, arguments, message):
    model = AutoModelForCausalLM.from_pretrained(tiny / "model")
    with pytest.raises(ValueError, match=message):
        generate(model, AutoTokenizer.from_pretrained(tiny / "model"), ["a"], **arguments)


@pytest.fixture(scope="module")
def demo_data():
    spec = importlib.util.spec_from_file_location("make_demo_data", EXAMPLES / "make_demo_data.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_demo_files_are_what_the_generator_writes(tmp_path):
    script = EXAMPLES / "make_demo_data.py"
    subprocess.run([sys.executable, script, "--output-dir", tmp_path], check=True, capture_output=True)
    for name in ("demo_train.jsonl", "demo_eval.jsonl"):
        assert (tmp_path / name).read_bytes() == (EXAMPLES / name).read_bytes()


def test_demo_evaluation_is_held_out(demo_data):
    train, evaluation = demo_data.make_data()
    assert len(train) == demo_data.TRAIN_SIZE and len(evaluation) == demo_data.EVAL_SIZE
    for name in ("input", "output"):
        assert not {record[name] for record in train} & {record[name] for record in evaluation}
    assert len({record["input"] for record in train}) == len(train)
    for records in (train, evaluation):
        assert {record["instruction"] for record in records} == set(demo_data.INSTRUCTIONS.values())
        share = sum(not record["input"].isascii() for record in records) / len(records)
        assert 0.1 < share < 0.3
    # Nothing in an evaluation record is new by itself: only the combination is.
    known = {field for record in train for field in record["output"].split("; ")}
    assert all(field in known for record in evaluation for field in record["output"].split("; "))


def test_compare_measures_each_method(tiny, tmp_path):
    """Three answers learned by heart by two methods, and not by a prompt at a rate of nothing."""
    out = tmp_path / "compare"
    settings = {"model": str(tiny / "model"), "data": str(tiny / "data.jsonl"), "eval_data": str(tiny / "data.jsonl")}
    settings |= {"output_dir": str(out), "batch_size": 12, "max_steps": 60, "dtype": "float32", "eval_steps": 30}
    methods = {
        "full": {"lr": 1e-2},
        "lora, r 8": {"method": "lora", "lr": 2e-2, "r": 8},
        "prompt": {"lr": 1e-9, "num_virtual_tokens": 3},
    }
    (tmp_path / "compare.yaml").write_text(yaml.safe_dump({**settings, "methods": methods}))
    arguments = ["compare", "--config", tmp_path / "compare.yaml", "--prompts", 6, "--max-new-tokens", 8]
    result = run(*arguments)
    assert result.exit_code == 0, result.output

    rows = {row.pop("name"): row for row in json.loads((out / "comparison.json").read_text())}
    assert list(rows) == ["base model", *methods]
    base, full, lora, prompt = rows.values()
    assert base["trainable"] == base["exact_match"] == 0 and base["eval_loss"] > 4 and base["merges"] is None
    parameters = sum(p.numel() for p in LlamaForCausalLM.from_pretrained(tiny / "model").parameters())
    assert full["trainable"] == parameters and full["trainable_percent"] == 100
    # r (in + out) for each linear layer: q and o 64 x 64, k and v 32 x 64, gate, up and down 128 x 64.
    assert lora["trainable"] == 2 * 8 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 128))
    assert prompt["trainable"] == 3 * 64 and prompt["extra_tokens"] == 3 and lora["extra_tokens"] == 0
    for row in (full, lora):
        assert row["eval_loss"] < 0.2 and row["exact_match"] == row["answered"] == 6
    assert prompt["eval_loss"] > 4 and prompt["exact_match"] == 0
    # float32 and a header; what no process with torch in it can do without
    assert 0 <= lora["file_bytes"] - 4 * lora["trainable"] < 8192 and lora["peak_bytes"] > 5e7
    assert [row["merges"] for row in (lora, prompt)] == [True, False]
    assert (out / "comparison.png").read_bytes().startswith(b"\x89PNG")
    table = (out / "comparison.md").read_text()
    assert table in result.output and "| lora, r 8 |" in table and "6 of 6" in table

    before = (out / "comparison.json").read_bytes()
    again = run(*arguments)
    assert again.exit_code == 0 and (out / "comparison.json").read_bytes() == before
    # Interrupted before its first checkpoint; with other methods, in another order.
    shutil.rmtree(out / "prompt" / "checkpoint-last")
    (out / "prompt" / "result.json").unlink()
    assert (out / "prompt" / "metrics.jsonl").exists()
    some = run(*arguments, "--methods", "prompt,full")
    assert some.exit_code == 0, some.output
    names = [row["name"] for row in json.loads((out / "comparison.json").read_text())]
    assert names == ["base model", "prompt", "full"]
    other = run(*arguments, "--seed", 1)
    assert other.exit_code == 2 and "was made by other settings" in other.stderr


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ({"lora": {"rank": 3}}, "methods: lora: unknown field 'rank'"),
        ({"lore": None}, "methods: lore: method must be one of"),
        ({"base model": {"method": "lora"}}, "methods: 'base model' is taken"),
        (["lora"], "methods is"),
    ],
)
def test_compare_names_a_bad_run(methods, message):
    settings = {"model": "m", "data": "d", "eval_data": "e"}
    with pytest.raises(ValueError, match=message):
        plan(settings, methods)
    runs = plan({**settings, "optimizer": "loraplus"}, {"lora": None, "full": None})
    assert [run.optimizer for run in runs.values()] == ["loraplus", "adamw"]
    with pytest.raises(ValueError, match="methods: full: optimizer must be adamw"):
        plan(settings, {"full": {"optimizer": "loraplus"}})
    with pytest.raises(ValueError, match="eval_data is missing"):
        plan({"model": "m", "data": "d"}, {"lora": None})
    with pytest.raises(ValueError, match="method is 'lora' for all runs"):
        plan({**settings, "method": "lora"}, {"prefix": None})
