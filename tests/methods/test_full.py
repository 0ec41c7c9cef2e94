"""Full fine-tuning: what is trained, the files, the trainer, and the interface that it shares with other methods."""

import json

import pytest
import torch
from tiny_chat import tiny_llama, tiny_records, tiny_tokenizer
from tiny_models import logits, perturb, tiny_batch, tiny_model
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from lora_kernels import (
    FullConfig,
    LoRAConfig,
    NF4Linear,
    PromptConfig,
    adapters_disabled,
    inject,
    load_adapter,
    merge,
    save_adapter,
    trainable_summary,
)
from lora_kernels.cli.commands import app
from lora_kernels.data.dataset import build_dataset
from lora_kernels.train.config import SFTConfig
from lora_kernels.train.sft import run_sft, train_sft


def trained(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_which_weights_are_trained():
    names = {name for name, _ in tiny_model("llama").named_parameters()}
    summary = trainable_summary(inject(tiny_model("llama"), FullConfig()))
    assert summary.trainable == summary.total > 0
    cases = {
        "all": names,
        r"model\.layers\.1": {name for name in names if ".layers.1." in name},
        r".*\.(q|v)_proj": {name for name in names if "q_proj" in name or "v_proj" in name},
        ("mlp", "layers.0.self_attn.o_proj"): {name for name in names if ".mlp." in name or "0.self_attn.o_" in name},
        ("lm_head",): {"lm_head.weight"},
    }
    for modules, expected in cases.items():
        model = inject(tiny_model("llama"), FullConfig(modules))
        assert trained(model) == expected and expected
        assert torch.equal(logits(model), logits(tiny_model("llama")))
    tied = inject(tiny_model("llama", tied=True), FullConfig(["lm_head"]))
    assert tied.get_input_embeddings().weight.requires_grad
    for excluded in ("embed_tokens", "lm_head"):
        tied = inject(tiny_model("llama", tied=True), FullConfig(exclude_modules=[excluded]))
        assert trained(tied) == names - {"model.embed_tokens.weight", "lm_head.weight"}


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2"])
@pytest.mark.parametrize("tied", [False, True])
def test_transformers_loads_what_is_saved(kind, tied, tmp_path):
    model = inject(tiny_model(kind, tied), FullConfig())
    perturb(model, 0.1)
    want = logits(model)
    save_adapter(model, tmp_path / "out")
    # Over an older one, as the best model of a run replaces the one before.
    perturb(model, 0.1)
    save_adapter(model, tmp_path / "out")
    assert not torch.equal(logits(model), want)
    want = logits(model)
    files = ["config.json", "generation_config.json", "model.safetensors"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == files
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="float32")), want)
    again = load_adapter(tiny_model(kind, tied), tmp_path / "out")
    assert torch.equal(logits(again), want) and trained(again) == trained(model)
    frozen = load_adapter(tiny_model(kind, tied), tmp_path / "out", trainable=False)
    assert torch.equal(logits(frozen), want) and not trained(frozen)
    assert torch.equal(logits(merge(model)), want) and not trained(model)
    inject(model, LoRAConfig(r=2))


def test_what_does_not_fit_is_refused_by_name(tmp_path):
    for modules in ("", [], ()):
        with pytest.raises(ValueError, match="modules is empty"):
            FullConfig(modules)
    with pytest.raises(ValueError, match=r"modules: '\(' is not a regular expression"):
        FullConfig("(")
    base = tiny_model("llama")
    for modules in (["q_porj"], "q_proj"):
        with pytest.raises(ValueError, match=r"modules: '(q_porj|q_proj)' matches no module of LlamaForCausalLM"):
            inject(base, FullConfig(modules))
    assert all(parameter.requires_grad for parameter in base.parameters())
    quantized = tiny_model("llama")
    quantized.lm_head.weight = torch.nn.Parameter(torch.zeros(61, 32, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match=r"includes 'lm_head.weight', which is quantized"):
        inject(quantized, FullConfig())
    nf4 = tiny_model("llama")
    nf4.model.layers[0].mlp.up_proj = NF4Linear.from_linear(torch.nn.Linear(64, 48))
    with pytest.raises(ValueError, match=r"includes 'model.layers.0.mlp.up_proj.weight', which is quantized"):
        inject(nf4, FullConfig(["mlp"]))
    inject(nf4, FullConfig(["self_attn"]))
    model = inject(base, FullConfig())
    with pytest.raises(ValueError, match="already carries what FullConfig put in"):
        inject(model, FullConfig())
    with pytest.raises(ValueError, match="keeps no base model"):
        adapters_disabled(model)

    save_adapter(model, tmp_path)
    with pytest.raises(ValueError, match="a LoRAConfig was injected"):
        load_adapter(inject(tiny_model("llama"), LoRAConfig()), tmp_path)
    larger = tiny_llama(hidden_size=64)
    before = larger.state_dict()["lm_head.weight"].clone()
    with pytest.raises(ValueError, match=r"doesn't fit the model, a LlamaForCausalLM: lm_head.weight is \[340, 64\]"):
        load_adapter(larger, tmp_path)
    assert torch.equal(larger.state_dict()["lm_head.weight"], before)
    with pytest.raises(FileNotFoundError, match="adapter_config.json does not exist"):
        load_adapter(tiny_model("llama"), tmp_path / "nowhere")


def test_interface_of_lora():
    """The functions of the package pass on to those of the method."""
    model, base = tiny_model("llama"), logits(tiny_model("llama"))
    with pytest.raises(ValueError, match="no adapter_config"):
        merge(model)
    inject(model, LoRAConfig(r=2, init="both_gaussian"))
    moved = logits(model)
    assert not torch.allclose(moved, base, atol=1e-2)
    with adapters_disabled(model):
        assert torch.equal(logits(model), base)
    with pytest.raises(ValueError, match="already carries what LoRAConfig put in"):
        inject(model, PromptConfig())
    merge(model)
    torch.testing.assert_close(logits(model), moved, rtol=0, atol=1e-5)
    inject(model, PromptConfig(num_virtual_tokens=2))


def tiny_dataset(count=22):
    return build_dataset([(r, f"data:{i}") for i, r in enumerate(tiny_records(count))], tiny_tokenizer(), 128, "data")


def settings(out, **changes):
    defaults = {"model": "tiny", "data": "tiny", "method": "full", "lr": 1e-3, "max_steps": 4, "save_steps": 2}
    return SFTConfig(**defaults | changes, output_dir=str(out))


@pytest.mark.parametrize("target", ["all", "model.norm,mlp"])
def test_a_step_is_torchs_own(target, tmp_path):
    """Against AdamW on the loss of the model's own logits, on the same rows."""
    dataset = tiny_dataset(8)
    config = settings(tmp_path / "out", target=target, batch_size=8, max_steps=1, warmup_ratio=0, lr_scheduler="linear")
    model = inject(tiny_llama(), FullConfig("all" if target == "all" else ["model.norm", "mlp"]))
    train_sft(model, dataset, None, config, progress=False)

    other = inject(tiny_llama(), FullConfig("all" if target == "all" else ["model.norm", "mlp"])).train()
    parameters = [parameter for parameter in other.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0)
    batch = dataset.batch(range(8))
    predicted = other(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    F.cross_entropy(predicted.flatten(0, 1), batch["labels"][:, 1:].flatten()).backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    start = tiny_llama().state_dict()
    for (name, got), want in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        moved = (want - start[name]).abs().max().item()
        assert (moved > 0) == (target == "all" or "mlp" in name or name == "model.norm.weight"), name
        # AdamW's first step is lr times the sign of the gradient, whatever its size; near zero the sign is noise.
        assert ((got - want).abs() > 1e-5).float().mean() < 0.01, name


def test_the_trainer_continues_a_killed_run_exactly(tmp_path):
    class KilledError(Exception):
        pass

    def die(record):
        if record["step"] == 3:
            raise KilledError

    def train(out, callbacks=(), **changes):
        model = inject(tiny_llama(), FullConfig())
        train_sft(model, tiny_dataset(), None, settings(out, **changes), callbacks=callbacks, progress=False)
        return model.state_dict()

    want = train(tmp_path / "whole")
    with pytest.raises(KilledError):
        train(tmp_path / "cut", callbacks=[die])
    got = train(tmp_path / "cut", resume=True)
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_run_from_files_and_the_command_line(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    data, out = tmp_path / "train.json", tmp_path / "out"
    data.write_text(json.dumps(tiny_records(22)))
    files = {"model": str(tmp_path / "model"), "data": str(data), "eval_data": str(data)}
    result = run_sft(settings(out, **files, max_steps=12, lr=5e-3), progress=False)
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert result.eval_loss < 0.9 * metrics[0]["loss"]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert result.trainable_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert tokenizer.chat_template == tiny_tokenizer().chat_template
    batch = tiny_dataset().batch(range(22))
    with torch.no_grad():
        predicted = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    loss = F.cross_entropy(predicted.flatten(0, 1), batch["labels"][:, 1:].flatten())
    assert loss.item() == pytest.approx(result.best_eval_loss, rel=1e-4)

    for flag in ("--adapter", "--model"):
        arguments = ["--prompt", "red apple", "--max-new-tokens", "4", "--output", str(tmp_path / f"answers{flag}")]
        assert CliRunner().invoke(app, ["generate", flag, str(out), *arguments]).exit_code == 0
    assert (tmp_path / "answers--adapter").read_text() == (tmp_path / "answers--model").read_text() != ""
    merged = CliRunner().invoke(app, ["merge", "--adapter", str(out), "--output", str(tmp_path / "merged")])
    assert (
        merged.exit_code == 2
        and "holds a whole model: there is nothing to merge" in merged.output
        and not (tmp_path / "merged").exists()
    )
    with pytest.raises(FileExistsError, match=r"holds another run \(metrics.jsonl, model.safetensors, a checkpoint\)"):
        run_sft(settings(out, **files), progress=False)


def test_full_fine_tuning_is_in_float32():
    def config(**arguments):
        return SFTConfig(model="m", data="d", method="full", **arguments)

    assert (config().dtype, config().lr, config().target, config().init) == ("float32", 2e-5, "all", None)
    with pytest.raises(ValueError, match="dtype must be float32 with method full"):
        config(dtype="bfloat16")
    with pytest.raises(ValueError, match="init must be left out with method full"):
        config(init="default")


def test_command_line_of_a_method_without_merge(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "train.json").write_text(json.dumps(tiny_records(8)))
    runs = {"prompt": ["--num-virtual-tokens", "3", "--init", "text", "--init-text", "the cat"], "prefix": []}
    for method, flags in runs.items():
        out = str(tmp_path / method)
        arguments = ["--model", str(tmp_path / "model"), "--data", str(tmp_path / "train.json"), "--max-steps", "2"]
        made = CliRunner().invoke(app, ["sft", *arguments, "--method", method, "--output-dir", out, *flags])
        assert made.exit_code == 0, made.output
        asked = CliRunner().invoke(app, ["generate", "--adapter", out, "--prompt", "red", "--max-new-tokens", "3"])
        assert asked.exit_code == 0, asked.output
        merged = CliRunner().invoke(app, ["merge", "--adapter", out, "--output", str(tmp_path / "merged")])
        assert merged.exit_code == 2 and f"{method} tuning can't be merged" in merged.output
        batch = tiny_batch() % 340
        assert load_adapter(tiny_llama(), out)(input_ids=batch).logits.shape == (*batch.shape, 340)
