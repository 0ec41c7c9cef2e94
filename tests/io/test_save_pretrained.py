"""Models with our adapters in the trainers of others, which write them by save_pretrained."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from tiny_chat import tiny_tokenizer
from tiny_models import tiny_batch, tiny_model
from transformers import Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from lora_kernels import AdaLoRAConfig, FullConfig, LoRAConfig, PrefixConfig, PromptConfig, inject, load_adapter, merge

ADAPTER_FILES = {"adapter_config.json", "adapter_model.safetensors"}
CONFIGS = [LoRAConfig(r=2), LoRAConfig(r=2, use_dora=True), PrefixConfig(num_virtual_tokens=3), PromptConfig(3)]


def adapted(config=CONFIGS[0]):
    return inject(tiny_model("llama"), config)


def names(directory):
    return {path.name for path in directory.iterdir()}


def logits(model):
    with torch.no_grad():
        return model.eval()(tiny_batch()).logits


def dataset(rows=12):
    torch.manual_seed(3)
    ids = torch.randint(3, 61, (rows, 8))
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": ids.tolist()})


def trainer(model, output_dir, kind):
    arguments = dict(
        output_dir=str(output_dir), per_device_train_batch_size=2, max_steps=4, save_steps=2, learning_rate=1e-2,
        logging_steps=1, report_to=[], use_cpu=True, seed=5, disable_tqdm=True,
    )  # fmt: skip
    if kind is SFTTrainer:
        prepared = {"dataset_kwargs": {"skip_prepare_dataset": True}, "bf16": False}
        return SFTTrainer(
            model, SFTConfig(**arguments, **prepared), train_dataset=dataset(), processing_class=tiny_tokenizer()
        )
    return Trainer(model, TrainingArguments(**arguments), train_dataset=dataset())


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config).__name__)
def test_an_adapted_model_saves_its_adapter_as_peft_does(config, tmp_path):
    model = adapted(config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path / "adapter")
    assert names(tmp_path / "adapter") == ADAPTER_FILES
    want = logits(model)
    theirs = logits(PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "adapter"))
    # Theirs has those of virtual tokens too.
    torch.testing.assert_close(theirs[:, -want.shape[1] :], want)
    loaded = load_adapter(tiny_model("llama"), tmp_path / "adapter")
    loaded.save_pretrained(tmp_path / "again")
    torch.testing.assert_close(logits(load_adapter(tiny_model("llama"), tmp_path / "again")), want)


def test_a_merged_or_fully_trained_model_saves_itself(tmp_path):
    merge(adapted()).save_pretrained(tmp_path / "merged")
    inject(tiny_model("llama"), FullConfig()).save_pretrained(tmp_path / "full")
    for name in ("merged", "full"):
        assert {"config.json", "model.safetensors"} <= names(tmp_path / name)
        assert not ADAPTER_FILES & names(tmp_path / name)


def test_what_save_pretrained_of_an_adapted_model_refuses(tmp_path):
    model = adapted()
    with pytest.raises(ValueError, match="push_to_hub is True; allowed: False"):
        model.save_pretrained(tmp_path / "adapter", push_to_hub=True)
    model.save_pretrained(tmp_path / "adapter", is_main_process=False)
    assert not (tmp_path / "adapter").exists()
    save = model.save_pretrained
    del model
    with pytest.raises(RuntimeError, match="the model of this save_pretrained is gone"):
        save(tmp_path / "adapter")


def test_copies_save_their_own_adapter_and_nothing_is_a_cycle(tmp_path):
    model = adapted()
    for name, other in {"copied": copy.deepcopy(model), "pickled": pickle.loads(pickle.dumps(model))}.items():
        torch.nn.init.normal_(other.model.layers[0].self_attn.q_proj.lora_b)
        other.save_pretrained(tmp_path / name)
        torch.testing.assert_close(logits(load_adapter(tiny_model("llama"), tmp_path / name)), logits(other))
    gc.collect()
    gc.disable()
    try:
        dead = weakref.ref(model)
        del model
        assert dead() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("kind", [Trainer, SFTTrainer])
def test_trainers_write_the_adapter_and_resume_from_it(kind, tmp_path):
    config = LoRAConfig(r=2, lora_dropout=0.1)
    whole = trainer(adapted(config), tmp_path / "whole", kind)
    whole.train()
    whole.save_model(tmp_path / "final")
    assert names(tmp_path / "final") & {"model.safetensors", *ADAPTER_FILES} == ADAPTER_FILES
    assert names(tmp_path / "whole" / "checkpoint-2") >= ADAPTER_FILES
    resumed = trainer(adapted(config), tmp_path / "whole", kind)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for name, parameter in whole.model.named_parameters():
        torch.testing.assert_close(resumed.model.get_parameter(name), parameter, msg=name)
    theirs = PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "final")
    torch.testing.assert_close(logits(theirs), logits(whole.model))


def test_an_adalora_model_saves_its_adapter(tmp_path):
    model = adapted(AdaLoRAConfig(target_r=2, init_r=3))
    model.save_pretrained(tmp_path / "adapter")
    assert names(tmp_path / "adapter") == ADAPTER_FILES
    torch.testing.assert_close(logits(load_adapter(tiny_model("llama"), tmp_path / "adapter")), logits(model))
