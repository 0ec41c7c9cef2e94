"""QLoRA from files to files: NF4 loading, bitsandbytes checkpoints both ways, training, merging.

Compared with bitsandbytes, transformers and PEFT, and with the dense model that the 4-bit values mean.
"""

import json
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tiny_chat import tiny_llama, tiny_records, tiny_tokenizer
from tiny_models import tiny_model
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GPTNeoConfig, GPTNeoForCausalLM
from typer.testing import CliRunner

from lora_kernels import LoRAConfig, NF4Linear, NF4Weight, inject, load_adapter, merge, quantize_nf4, save_adapter
from lora_kernels.cli.commands import app
from lora_kernels.data.dataset import build_dataset
from lora_kernels.io.models import load_model
from lora_kernels.io.nf4 import save_nf4_model
from lora_kernels.methods.lora import lora_modules, trainable_summary
from lora_kernels.train.config import SFTConfig
from lora_kernels.train.sft import run_sft, train_sft

# Rows of whole blocks of 64: with AVX-512, bitsandbytes 0.50 dequantises others wrongly.
HIDDEN = {"hidden_size": 64, "intermediate_size": 128}
bnb = pytest.importorskip("bitsandbytes")


def write_model(directory, model=None, **save):
    (tiny_llama(**HIDDEN) if model is None else model).save_pretrained(directory, **save)
    tiny_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


def token_ids():
    return torch.randint(3, 300, (2, 9), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def logits(model):
    return model(input_ids=token_ids()).logits


def nf4_layers(model):
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, NF4Linear)}


def rounded_to_nf4(model, dtype=torch.float32, double_quant=False):
    """The dense model with every inner linear weight replaced by its NF4 value."""
    model = model.to(dtype)
    for name, module in model.named_modules():
        if type(module) is nn.Linear and name != "lm_head":
            module.weight.data = quantize_nf4(module.weight.detach(), double_quant=double_quant).dequantize()
    return model.eval()


def edit_config(directory, **changes):
    path = Path(directory) / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("shards", [None, "60KB"])
@pytest.mark.parametrize(("tied", "double_quant"), [(True, False), (False, True)])
def test_load_reads_straight_into_nf4(tmp_path, shards, tied, double_quant):
    dense = tiny_llama(**HIDDEN, tie_word_embeddings=tied)
    write_model(tmp_path, dense, **({} if shards is None else {"max_shard_size": shards}))
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shards is not None)
    model, tokenizer = load_model(tmp_path, "float32", quantize="nf4", double_quant=double_quant)
    assert len(nf4_layers(model)) == 14 and "lm_head" not in nf4_layers(model)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert not model.training and not any(layer.training for layer in nf4_layers(model).values())
    assert not [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    assert model.config._name_or_path == str(tmp_path) and tokenizer.chat_template
    assert all(layer.weight.double_quant == double_quant for layer in nf4_layers(model).values())
    torch.testing.assert_close(logits(model), logits(rounded_to_nf4(dense, double_quant=double_quant)))


@pytest.mark.parametrize("dtype", ["bfloat16", "stored"])
def test_load_casts_before_it_quantises_as_transformers_does(tmp_path, dtype):
    stored = torch.float32 if dtype == "bfloat16" else torch.bfloat16
    write_model(tmp_path, tiny_llama(**HIDDEN).to(stored))
    model, _ = load_model(tmp_path, dtype, quantize="nf4")
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    other = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.bfloat16, quantization_config=settings, device_map="cpu"
    )
    assert model.dtype == torch.bfloat16
    assert bitsandbytes_weights(other).keys() == nf4_layers(model).keys()
    for name, weight in bitsandbytes_weights(other).items():
        assert torch.equal(nf4_layers(model)[name].weight.dequantize(), weight), name


def bitsandbytes_weights(model):
    return {
        name: bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        for name, layer in model.named_modules()
        if isinstance(layer, bnb.nn.Linear4bit)
    }


def test_skip_modules(tmp_path):
    dense = tiny_model("qwen2")
    write_model(tmp_path, dense)
    model, _ = load_model(tmp_path, "float32", quantize="nf4", block_size=32, skip_modules=["v_proj", "0.mlp.up_proj"])
    kept = {"model.layers.0.self_attn.v_proj", "model.layers.1.self_attn.v_proj", "model.layers.0.mlp.up_proj"}
    layers = nf4_layers(model)
    assert len(layers) == 11 and not kept & layers.keys()
    for name, module in dense.named_modules():
        if type(module) is nn.Linear:
            loaded = model.get_submodule(name)
            if name in layers:
                assert layers[name].weight.block_size == 32
                assert torch.equal(loaded.weight.dequantize(), quantize_nf4(module.weight, 32).dequantize())
            else:
                assert torch.equal(loaded.weight, module.weight)
            assert module.bias is None or torch.equal(loaded.bias, module.bias)
    # Rotary frequencies are in no file.
    for name, buffer in dense.named_buffers():
        assert torch.equal(model.get_buffer(name), buffer), name
    with pytest.raises(ValueError, match="skip_modules: the model has no linear layer 'w_proj'"):
        load_model(tmp_path, "float32", quantize="nf4", skip_modules=["w_proj"])


PEAK = """
import re, sys, torch
from lora_kernels.io.nf4 import load_nf4_model
def peak(): return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
tiny = load_nf4_model(sys.argv[1], torch.float32)
before = peak()
model = load_nf4_model(sys.argv[2], torch.float32, progress=False)
size = sum(tensor.nbytes for tensor in model.state_dict().values())
print(peak() - before, size)
"""


# Not getrusage: its maximum begins with that of the process that started this one.
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from Linux's /proc")
def test_memory_peaks_near_the_4_bit_size(tmp_path, model_dir):
    width = 768
    with torch.device("meta"):
        wide = tiny_llama(hidden_size=width, intermediate_size=2 * width, num_hidden_layers=10)
    state = {name: torch.zeros(tensor.shape) for name, tensor in wide.state_dict().items() if name != "lm_head.weight"}
    wide.config.save_pretrained(tmp_path)
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    dense_bytes = sum(tensor.nbytes for tensor in state.values())
    code = [sys.executable, "-c", PEAK, str(model_dir), str(tmp_path)]
    peak, size = map(int, subprocess.run(code, capture_output=True, text=True, check=True).stdout.split())
    largest = 4 * 2 * width * width
    # The tensor as read, its pages in the file, and what quantising makes of it.
    assert peak < size + 4 * largest < dense_bytes / 3, (peak, size, dense_bytes)


def damage(directory, name, change):
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors, name)
    save_file(tensors, path, metadata={"format": "pt"})


def set_nan(tensors, name):
    tensors[name][3, 5] = float("nan")


def cut(tensors, name):
    tensors[name] = tensors[name][:-1].contiguous()


def drop(tensors, name):
    del tensors[name]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_nan, r"model\.safetensors: tensor {} *: weight has an element that is not finite"),
        (cut, r"model\.safetensors: tensor {}: shape is \[127, 64\], the model needs \[128, 64\]"),
        (drop, r"don't fit LlamaForCausalLM: {} missing"),
    ],
)
def test_a_bad_tensor_is_refused_by_name(tmp_path, change, message):
    write_model(tmp_path)
    name = "model.layers.1.mlp.up_proj.weight"
    damage(tmp_path, name, change)
    with pytest.raises(ValueError, match=message.format(name.replace(".", r"\."))):
        load_model(tmp_path, "float32", quantize="nf4")


def test_a_bad_file_is_refused_by_name(tmp_path, model_dir):
    write_model(tmp_path / "short")
    path = tmp_path / "short" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="model.safetensors is not a complete safetensors file"):
        load_model(tmp_path / "short", "float32", quantize="nf4")

    write_model(tmp_path / "shards", max_shard_size="60KB")
    next((tmp_path / "shards").glob("model-00002*")).unlink()
    with pytest.raises(ValueError, match=r"model-00002-of-\d+.safetensors does not exist"):
        load_model(tmp_path / "shards", "float32", quantize="nf4")
    (tmp_path / "shards" / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(ValueError, match="index.json is not an index"):
        load_model(tmp_path / "shards", "float32", quantize="nf4")

    write_model(tmp_path / "gptq")
    edit_config(tmp_path / "gptq", quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(ValueError, match="quantization_config is .*gptq.*; supported: bitsandbytes nf4"):
        load_model(tmp_path / "gptq", "float32", quantize="nf4")

    write_model(tmp_path / "gpt2", tiny_model("gpt2"))
    with pytest.raises(ValueError, match=r"no torch.nn.Linear to quantise"):
        load_model(tmp_path / "gpt2", "float32", quantize="nf4")
    with pytest.raises(ValueError, match="quantize is 'int4'; allowed: None, 'nf4'"):
        load_model(model_dir, "float32", quantize="int4")


def add(**tensors):
    return lambda found: found.update({name.replace("__", "."): tensor for name, tensor in tensors.items()})


def without_prefix(tensors):
    for name in list(tensors):
        tensors[name.removeprefix("model.")] = tensors.pop(name)


def gpt_neo():
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "window_size": 4, "intermediate_size": 128}
    return GPTNeoForCausalLM(
        GPTNeoConfig(vocab_size=300, max_position_embeddings=32, attention_types=[[["global", "local"], 1]], **sizes)
    )


OLD_BUFFERS = add(
    transformer__h__0__attn__attention__bias=torch.ones(1, 1, 32, 32, dtype=torch.bool),
    transformer__h__0__attn__attention__masked_bias=torch.tensor(-1e9),
)
# name: (model, change of its tensors, change of its config, warning)
FILES = {
    "old buffers": (gpt_neo, OLD_BUFFERS, {}, "no place for .*attention.bias, .*masked_bias, left"),
    "old rotary": (tiny_llama, add(model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(8)), {}, None),
    "old positions": (tiny_llama, add(model__embeddings__position_ids=torch.arange(9)), {}, None),
    "another head": (tiny_llama, add(score__weight=torch.ones(2, 64)), {}, "no place for score.weight, left out"),
    "more layers": (tiny_llama, add(), {"num_hidden_layers": 1, "layer_types": None}, "layers.1.*, left out"),
    "names of the base model": (tiny_llama, without_prefix, {}, None),
    "a head of its own": (
        *(tiny_llama, add(lm_head__weight=torch.linspace(-1, 1, 340 * 64).view(340, 64)), {}),
        "ties .*lm_head.weight.*stays apart; set tie_word_embeddings to false",
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_what_transformers_loads_is_loaded_with_the_same_values(tmp_path, case):
    build, change, config, message = FILES[case]
    write_model(tmp_path, build(**HIDDEN) if build is tiny_llama else build())
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    edit_config(tmp_path, **config)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model, _ = load_model(tmp_path, "float32", quantize="nf4")
    found = [str(each.message) for each in caught if re.search("no place for|config.json ties", str(each.message))]
    assert len(found) == (message is not None)
    assert all(re.search(message, text) for text in found)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert {name for name, _ in model.named_parameters()} <= {name for name, _ in theirs.named_parameters()}
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == (case != "a head of its own")
    torch.testing.assert_close(logits(model), logits(rounded_to_nf4(theirs)))


def test_bitsandbytes_files_with_the_names_of_the_base_model(tmp_path, model_dir):
    whole, _ = load_model(model_dir, "float32", quantize="nf4")
    save_nf4_model(whole, tmp_path / "base", tiny_tokenizer())
    path = tmp_path / "base" / "model.safetensors"
    tensors = load_file(path)
    without_prefix(tensors)
    tensors["layers.7.mlp.up_proj.weight.quant_state.bitsandbytes__nf4"] = torch.ones(3, dtype=torch.uint8)
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.warns(UserWarning, match="no place for layers.7.mlp.up_proj.weight.quant_state"):
        model, _ = load_model(tmp_path / "base", "float32")
    assert nf4_layers(model).keys() == nf4_layers(whole).keys()
    assert torch.equal(logits(model), logits(whole))


def test_one_file_comes_before_shards(tmp_path):
    write_model(tmp_path, max_shard_size="60KB")
    tiny_llama(**HIDDEN, initializer_range=0.5).save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "model.safetensors", tmp_path)
    model, _ = load_model(tmp_path, "float32", quantize="nf4")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    torch.testing.assert_close(logits(model), logits(rounded_to_nf4(theirs)))


@pytest.mark.parametrize("double_quant", [False, True])
def test_what_bitsandbytes_saved_is_loaded_bit_for_bit(tmp_path, model_dir, double_quant):
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double_quant)
    saved = AutoModelForCausalLM.from_pretrained(
        model_dir, dtype=torch.float32, quantization_config=settings, device_map="cpu"
    )
    saved.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    # In 4 bits without being asked for: there is nothing else to load.
    model, _ = load_model(tmp_path, "float32")
    expected = bitsandbytes_weights(saved)
    assert nf4_layers(model).keys() == expected.keys() and len(expected) == 14
    for name, layer in nf4_layers(model).items():
        assert torch.equal(layer.weight.dequantize(), expected[name]), name
        assert layer.weight.double_quant == double_quant
    state, theirs = model.state_dict(), load_file(tmp_path / "model.safetensors")
    for name, tensor in theirs.items():
        if "quant_state" not in name:
            assert torch.equal(state[name], tensor), name
    torch.testing.assert_close(logits(model), logits(saved.train()))
    assert not hasattr(merge(inject(model, LoRAConfig())).config, "quantization_config")


@pytest.mark.parametrize("double_quant", [False, True])
def test_what_we_save_transformers_and_bitsandbytes_load_bit_for_bit(tmp_path, double_quant):
    write_model(tmp_path / "dense", tiny_model("qwen2", **HIDDEN))
    model, tokenizer = load_model(
        tmp_path / "dense", "float32", quantize="nf4", double_quant=double_quant, skip_modules=["v_proj"]
    )
    save_nf4_model(model, tmp_path / "saved", tokenizer)
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", device_map="cpu")
    theirs = bitsandbytes_weights(other)
    assert theirs.keys() == nf4_layers(model).keys() and len(theirs) == 12
    for name, layer in nf4_layers(model).items():
        assert torch.equal(layer.weight.dequantize(), theirs[name]), name
    assert other.dtype == torch.float32
    again, _ = load_model(tmp_path / "saved", "float32")
    assert again.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    with pytest.raises(ValueError, match="exists and is not empty"):
        save_nf4_model(model, tmp_path / "saved")
    with pytest.raises(ValueError, match="model has no NF4 layer"):
        save_nf4_model(tiny_llama(), tmp_path / "other")
    with pytest.raises(ValueError, match="carries LoRA adapters"):
        save_nf4_model(inject(model, LoRAConfig()), tmp_path / "other")
    assert not (tmp_path / "other").exists()


def qlora_model(model_dir, dtype="float32", double_quant=False, std=0.05):
    """A model in NF4 whose adapters, but for the layer without one, have random values."""
    model, _ = load_model(model_dir, dtype, quantize="nf4", double_quant=double_quant)
    inject(model, LoRAConfig(r=4, lora_alpha=8, exclude_modules=["o_proj"]))
    generator = torch.Generator().manual_seed(5)
    for _, layer in lora_modules(model):
        layer.lora_b.data = std * torch.randn(layer.lora_b.shape, generator=generator)
    return model


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merge_gives_a_dense_model(tmp_path, model_dir, dtype):
    model = qlora_model(model_dir, dtype)
    expected = {
        name: layer.weight.dequantize(torch.float32).double()
        + layer.scaling * layer.lora_b.double() @ layer.lora_a.double()
        for name, layer in lora_modules(model)
    }
    untouched = {name: layer.weight.dequantize() for name, layer in nf4_layers(model).items()}
    assert len(untouched) == 2
    before = logits(model)
    merge(model)
    assert not [m for m in model.modules() if isinstance(m, (NF4Weight, NF4Linear))]
    for name, weight in expected.items():
        merged = model.get_submodule(name)
        assert type(merged) is nn.Linear and merged.weight.dtype == getattr(torch, dtype)
        # One rounding to float32, and one to the dtype: the nearest value but for a tie that the first one made.
        torch.testing.assert_close(merged.weight.double(), weight, rtol=torch.finfo(merged.weight.dtype).eps, atol=1e-6)
    for name, weight in untouched.items():
        assert torch.equal(model.get_submodule(name).weight, weight)
    if dtype == "float32":
        torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert plain.dtype == getattr(torch, dtype)
    torch.testing.assert_close(logits(plain), logits(model))


@pytest.mark.parametrize("double_quant", [False, True])
def test_merge_to_nf4_says_what_it_costs(model_dir, double_quant):
    model = qlora_model(model_dir, double_quant=double_quant)
    silent = next(name for name, _ in lora_modules(model))
    model.get_submodule(silent).lora_b.data.zero_()
    parts = {
        name: (layer.weight.dequantize(), layer.scaling * layer.lora_b.detach() @ layer.lora_a.detach())
        for name, layer in lora_modules(model)
    }
    merge(model, quantize="nf4")
    assert len(nf4_layers(model)) == 14
    cost = model.merge_cost
    assert cost.error.keys() == cost.survival.keys() == parts.keys() - {silent}
    for name, (base, update) in parts.items():
        found = model.get_submodule(name).weight
        assert found.double_quant == double_quant
        w, delta = base.double(), update.double()
        values = bnb_rounded(w + delta, double_quant)
        torch.testing.assert_close(found.dequantize(), values, rtol=1e-2 if double_quant else 0, atol=0)
        if name == silent:
            continue
        q = found.dequantize().double()
        error = (q - w - delta).norm() / (w + delta).norm()
        survival = ((q - w) * delta).sum() / (delta * delta).sum()
        assert cost.error[name] == pytest.approx(error.item(), rel=1e-4)
        assert cost.survival[name] == pytest.approx(survival.item(), abs=1e-4)
    text = str(cost)
    worst = max(cost.error, key=cost.error.get)
    assert f"at most {cost.error[worst]:.2%} ({worst})" in text and "\n" not in text
    assert f"at least {min(cost.survival.values()):.1%}" in text


def bnb_rounded(weight, double_quant):
    packed, state = bnb.functional.quantize_4bit(
        weight.float(), quant_type="nf4", blocksize=64, compress_statistics=double_quant
    )
    return bnb.functional.dequantize_4bit(packed, state)


def test_merge_refuses(model_dir):
    with pytest.raises(ValueError, match="quantize is 'int8'"):
        merge(qlora_model(model_dir), quantize="int8")
    model = inject(tiny_model("gpt2"), LoRAConfig())
    with pytest.raises(ValueError, match="is a Conv1D; quantize='nf4' takes torch.nn.Linear only"):
        merge(model, quantize="nf4")
    assert dict(lora_modules(model))


def test_summary_counts_4_bit_elements(model_dir):
    dense, quantised = load_model(model_dir, "float32")[0], load_model(model_dir, "float32", quantize="nf4")[0]
    for model in (dense, quantised):
        inject(model, LoRAConfig(r=4))
    assert trainable_summary(quantised) == trainable_summary(dense)


@pytest.mark.parametrize("use_dora", [False, True])
def test_losses_are_those_of_peft_on_bitsandbytes(tmp_path, model_dir, use_dora):
    import peft

    settings = SFTConfig(
        model="tiny", data="tiny", output_dir=str(tmp_path / "run"), method="qlora", dtype="float32", max_steps=10,
        batch_size=4, lr=1e-2, lr_scheduler="constant", warmup_ratio=0.0, max_grad_norm=1.0,
    )  # fmt: skip
    records = [(record, f"data:{i}") for i, record in enumerate(tiny_records(40))]
    dataset = build_dataset(records, tiny_tokenizer(), 128, "data")
    model, _tokenizer = load_model(model_dir, "float32", quantize="nf4")
    inject(model, LoRAConfig(r=4, lora_alpha=8, use_dora=use_dora))
    save_adapter(model, tmp_path / "start")
    train_sft(model, dataset, None, settings, progress=False)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ours = [json.loads(line)["loss"] for line in lines]

    from lora_kernels.train.steps import StepPlan

    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    base = AutoModelForCausalLM.from_pretrained(
        model_dir, dtype=torch.float32, quantization_config=quantization, device_map="cpu"
    )
    other = peft.PeftModel.from_pretrained(base, tmp_path / "start", is_trainable=True).train()
    assert sum(isinstance(module, bnb.nn.Linear4bit) for module in other.modules()) == 14
    parameters = [parameter for parameter in other.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=0.0)
    plan = StepPlan(len(dataset), 4, 1, 1, 1.0, 10, settings.seed)
    theirs = []
    for step in range(10):
        batch = dataset.batch(plan.step_rows(step))
        scores = other(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        loss = nn.functional.cross_entropy(scores[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        theirs.append(loss.item())
    assert ours == pytest.approx(theirs, rel=1e-4)
    assert ours[-1] < 0.9 * ours[0]


def write_data(path, count=22):
    path.write_text(json.dumps(tiny_records(count)))
    return path


def test_run_and_resume(tmp_path, model_dir):
    settings = {
        "model": str(model_dir), "data": str(write_data(tmp_path / "data.json")), "method": "qlora", "r": 4,
        "double_quant": True, "dtype": "float32", "batch_size": 8, "max_steps": 4, "save_steps": 2, "lora_dropout": 0.1,
    }  # fmt: skip

    def losses(directory):
        lines = (tmp_path / directory / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line)["loss"] for line in lines]

    run_sft(SFTConfig(**settings, output_dir=str(tmp_path / "whole")), progress=False)
    written = yaml.safe_load((tmp_path / "whole" / "config.yaml").read_text())
    assert written["method"] == "qlora" and written["double_quant"] is True

    class Killed(Exception):
        pass

    def kill(record):
        if record["step"] == 3:
            raise Killed

    parts = SFTConfig(**settings, output_dir=str(tmp_path / "parts"))
    with pytest.raises(Killed):
        run_sft(parts, callbacks=[kill], progress=False)
    with pytest.raises(ValueError, match="made with double_quant = True, this run has False"):
        run_sft(
            SFTConfig(**{**settings, "double_quant": False}, resume=True, output_dir=parts.output_dir), progress=False
        )
    run_sft(SFTConfig(**settings, resume=True, output_dir=parts.output_dir), progress=False)
    assert losses("parts") == losses("whole")
    for name, tensor in load_file(tmp_path / "whole" / "adapter_model.safetensors").items():
        assert torch.equal(load_file(tmp_path / "parts" / "adapter_model.safetensors")[name], tensor)

    # A plain PEFT adapter: onto the dense base, and onto the 4-bit one as it was trained.
    import peft

    dense = load_adapter(load_model(model_dir, "float32")[0], tmp_path / "whole")
    plain = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_dir), tmp_path / "whole").eval()
    torch.testing.assert_close(logits(dense), logits(plain), rtol=1e-4, atol=1e-4)


def test_dora_on_a_four_bit_checkpoint(tmp_path, model_dir):
    """--method dora keeps the checkpoint's NF4 weights; the trained adapter loads and merges."""
    model, tokenizer = load_model(model_dir, "float32", quantize="nf4")
    save_nf4_model(model, tmp_path / "nf4")
    tokenizer.save_pretrained(tmp_path / "nf4")
    data, run, merged = write_data(tmp_path / "data.json"), tmp_path / "run", tmp_path / "merged"
    result = command(
        "sft", "--model", tmp_path / "nf4", "--data", data, "--method", "dora", "--lr", 0.02, "--batch-size", 8,
        "--dtype", "float32", "--lora-dropout", 0.1, "--max-steps", 4, "--output-dir", run,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    tensors = load_file(run / "adapter_model.safetensors")
    assert sum(key.endswith("lora_magnitude_vector") for key in tensors) == 14
    trained = load_adapter(load_model(tmp_path / "nf4", "float32")[0], run)
    layers = dict(lora_modules(trained))
    assert all(isinstance(layer.weight, NF4Weight) for layer in layers.values())
    assert any(not torch.allclose(layer.lora_magnitude, layer._weight_squares.sqrt()) for layer in layers.values())
    result = command("merge", "--adapter", run, "--output", merged)
    assert result.exit_code == 0, result.output
    plain = AutoModelForCausalLM.from_pretrained(merged)
    torch.testing.assert_close(logits(plain), logits(trained.eval()), rtol=1e-3, atol=1e-3)


def test_double_quant_needs_qlora():
    with pytest.raises(ValueError, match="double_quant must be left out with method lora, got True"):
        SFTConfig(model="m", data="d", double_quant=True)


def command(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


def test_command_line(tmp_path, model_dir):
    data, run, prompt = (
        write_data(tmp_path / "data.json"),
        tmp_path / "run",
        ["--prompt", "the cat", "--max-new-tokens", 6],
    )
    result = command(
        "sft", "--model", model_dir, "--data", data, "--method", "qlora", "--double-quant", "--dtype", "float32",
        "--max-steps", 6, "--batch-size", 8, "--lr", 0.02, "--output-dir", run,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert (config["method"], config["double_quant"]) == ("qlora", True)

    dense, quantised = (
        command("generate", "--adapter", run, "--dtype", "float32", *prompt, *more)
        for more in ([], ["--quantize", "nf4", "--double-quant"])
    )
    assert (dense.exit_code, quantised.exit_code) == (0, 0), dense.output + quantised.output

    result = command("merge", "--adapter", run, "--output", tmp_path / "nf4", "--quantize", "nf4", "--double-quant")
    assert result.exit_code == 0, result.output
    assert "of the update" in result.output
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "nf4", device_map="cpu")
    assert len(bitsandbytes_weights(merged)) == 14
    result = command("generate", "--model", tmp_path / "nf4", *prompt)
    assert result.exit_code == 0, result.output

    result = command("merge", "--adapter", run, "--output", tmp_path / "plain")
    assert result.exit_code == 0, result.output
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "plain").model.layers[0].mlp.up_proj) is nn.Linear

    result = command("generate", "--adapter", run, "--double-quant", *prompt)
    assert result.exit_code == 2 and "--double-quant needs --quantize nf4" in result.stderr
    result = command("generate", "--adapter", run, "--quantize", "int4", *prompt)
    assert result.exit_code == 2 and "quantize is 'int4'" in result.stderr


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_families_that_transformers_loads(tmp_path, quantize):
    """Without scaled_dot_product_attention; with tensors that older versions called otherwise."""
    from transformers import BloomConfig, BloomForCausalLM, GPTNeoXConfig, GPTNeoXForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 340, "hidden_size": 32, "num_attention_heads": 4}
    models = {
        "bloom": BloomForCausalLM(BloomConfig(**sizes, n_layer=2)),
        "gpt_neox": GPTNeoXForCausalLM(GPTNeoXConfig(**sizes, intermediate_size=64, num_hidden_layers=2)),
    }
    for name, dense in models.items():
        write_model(tmp_path / name, dense)
        model, _ = load_model(tmp_path / name, "float32", quantize=quantize)
        expected = rounded_to_nf4(dense) if quantize and name == "gpt_neox" else dense.eval()
        if quantize and name == "bloom":
            assert nf4_layers(model)
        else:
            torch.testing.assert_close(logits(model), logits(expected))


def test_tensors_that_would_be_merged_are_refused(tmp_path):
    transformers = pytest.importorskip("transformers", minversion="5.0")
    sizes = {"vocab_size": 340, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 1}
    config = transformers.MixtralConfig(**sizes, hidden_size=32, intermediate_size=48, num_local_experts=2)
    write_model(tmp_path, transformers.MixtralForCausalLM(config))
    load_model(tmp_path, "float32")
    with pytest.raises(ValueError, match=r"w1\.weight is to be merged .* load the MixtralForCausalLM dense"):
        load_model(tmp_path, "float32", quantize="nf4")
