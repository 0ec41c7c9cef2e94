"""Training and evaluation mode: whose dropout acts when, and that every switch leaves the modes as they were."""

import math

import pytest
import torch
import transformers
from tiny_chat import tiny_llama, tiny_tokenizer
from tiny_models import VOCAB, in_backward, tiny_batch, tiny_model
from tiny_pairs import pairs
from tiny_sft import read_metrics
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from lora_kernels.methods import FullConfig, adapters_disabled, inject
from lora_kernels.methods.lora import LoRAConfig, lora_modules
from lora_kernels.methods.modes import eval_mode
from lora_kernels.methods.named import add_adapter, use_adapter
from lora_kernels.models.generate import generate
from lora_kernels.train.activation_checkpointing import enable_checkpointing
from lora_kernels.train.causal_lm import AnswerLoss
from lora_kernels.train.config import PPOConfig
from lora_kernels.train.dpo import DPOLoss
from lora_kernels.train.launch import make_accelerator
from lora_kernels.train.loop import evaluate
from lora_kernels.train.ppo.trainer import run_ppo
from lora_kernels.train.reward import RewardLoss, RewardModel, attach_head, evaluate_pairs

# A model of each kind of randomness: modules, functions, numbers in the config, layers left out, noise of a router.
FAMILIES = {
    "GPT2LMHeadModel": {"resid_pdrop": 0.4, "embd_pdrop": 0.4, "attn_pdrop": 0.4},
    "GPTBigCodeForCausalLM": {"resid_pdrop": 0.4, "embd_pdrop": 0.4, "attn_pdrop": 0.4},
    "OPTForCausalLM": {"dropout": 0.4, "attention_dropout": 0.4, "layerdrop": 0.4, "ffn_dim": 48},
    "BioGptForCausalLM": {
        "hidden_dropout_prob": 0.4, "attention_probs_dropout_prob": 0.4, "activation_dropout": 0.4, "layerdrop": 0.4,
    },
    "XGLMForCausalLM": {
        "dropout": 0.4, "attention_dropout": 0.4, "activation_dropout": 0.4, "layerdrop": 0.4, "ffn_dim": 48,
    },
    "Starcoder2ForCausalLM": {"residual_dropout": 0.4, "embedding_dropout": 0.4, "attention_dropout": 0.4},
    "SeedOssForCausalLM": {"residual_dropout": 0.4, "attention_dropout": 0.4, "head_dim": 8},
    "LlamaForCausalLM": {"attention_dropout": 0.4},
    "MixtralForCausalLM": {"router_jitter_noise": 0.4, "num_local_experts": 2},
    "GPTNeoForCausalLM": {
        "embed_dropout": 0.4, "resid_dropout": 0.4, "attention_dropout": 0.4, "attention_types": [[["global"], 2]],
    },
    "BloomForCausalLM": {"hidden_dropout": 0.4, "attention_dropout": 0.4},
    "PhiForCausalLM": {"resid_pdrop": 0.4, "embd_pdrop": 0.4, "attention_dropout": 0.4},
}  # fmt: skip


def family(name, **changes):
    """A model of that family with dropout, in training mode."""
    torch.manual_seed(5)
    model_class = getattr(transformers, name)
    sizes = {"vocab_size": VOCAB, "max_position_embeddings": 64, **FAMILIES[name], **changes}
    config = model_class.config_class(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        bos_token_id=1, eos_token_id=2, pad_token_id=0, **sizes,
    )  # fmt: skip
    if hasattr(config, "num_key_value_heads"):
        config.num_key_value_heads = 2
    return model_class(config).train()


def batch():
    """Two pairs of the same prompt, rows of 9 tokens, 4 of them learned."""
    input_ids = torch.cat([tiny_batch(), tiny_batch().flip(1)])
    labels = input_ids.clone()
    labels[:, :5] = -100
    return {"input_ids": input_ids, "labels": labels, "lengths": torch.full((4,), 9), "margin": torch.zeros(2)}


def modes(model):
    return {name: part.training for name, part in model.named_modules()}


def in_use(model):
    return {name: mode for name, mode in modes(model).items() if not name.startswith("parked_adapters")}


def mixed(model):
    """Modes that no single .train() or .eval() gives."""
    for index, part in enumerate(model.modules()):
        part.training = index % 3 == 0
    return model


@pytest.mark.parametrize("name", FAMILIES)
def test_the_first_step_of_dpo_is_the_references(name):
    model = family(name)
    with torch.no_grad():
        found = [model(input_ids=tiny_batch()).logits for _ in range(2)]
    assert not torch.equal(*found)  # else there were no dropout to see
    inject(model, LoRAConfig(r=4, lora_dropout=0.5))
    module = DPOLoss(model).train()
    gradients, recomputed = [], []
    layer = next(part for part in model.modules() if isinstance(part, GradientCheckpointingLayer))
    for part in layer.children():
        part.register_forward_pre_hook(lambda *_: recomputed.append(in_backward()))
    for checkpointing in (False, True):
        if checkpointing:
            enable_checkpointing(model)
        module.zero_grad()
        recomputed.clear()
        torch.manual_seed(6)
        sums = module(**batch())
        # Two pairs; with lora_b = 0 lora_dropout changes nothing yet.
        assert sums["loss"].item() == pytest.approx(2 * math.log(2), rel=1e-6)
        assert sums["reward_chosen"].item() == sums["reward_rejected"].item() == 0
        sums["loss"].backward()
        assert any(recomputed) is checkpointing
        gradients.append(torch.cat([layer.lora_b.grad.flatten() for _, layer in lora_modules(model)]))
    assert gradients[0].abs().max() > 1e-5
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_reward_model_in_training_gives_one_answer_one_reward(name):
    model = attach_head(family(name))
    inject(model, LoRAConfig(r=4, modules_to_save=["score"], init="both_gaussian"))
    module = RewardLoss(model).train()
    values = {**batch(), "input_ids": tiny_batch().repeat(2, 1)}
    sums = module(**values)
    assert sums["reward_chosen"].item() == sums["reward_rejected"].item() != 0
    assert sums["loss"].item() == pytest.approx(2 * math.log(2), rel=1e-6)


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "OPTForCausalLM"])
def test_the_first_minibatch_of_ppo_is_the_policy_that_sampled(tmp_path, name, gradient_checkpointing):
    family(name, vocab_size=340, max_position_embeddings=128).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("say one\nsay two\nsay three\nsay four\n")
    config = PPOConfig(
        model=str(tmp_path / "model"), data=str(tmp_path / "prompts.txt"), output_dir=str(tmp_path / "out"),
        dtype="float32", rollout_size=4, max_new_tokens=6, max_length=100, max_steps=2, ppo_epochs=1, eval_prompts=0,
        lr=1e-2, reward="given", gradient_checkpointing=gradient_checkpointing,
    )  # fmt: skip
    run_ppo(config, progress=False, reward=lambda prompts, responses: [float(len(text)) for text in responses])
    first, second = (record for record in read_metrics(tmp_path / "out") if "objective/kl" in record)
    assert first["objective/kl"] == 0 and abs(second["objective/kl"]) > 1e-6
    for record in (first, second):
        assert record["val/ratio"] == 1 and record["policy/first_approxkl"] == 0


def test_lora_dropout_acts_in_training_and_what_the_base_has_does_not():
    model = inject(family("GPT2LMHeadModel"), LoRAConfig(r=4, lora_dropout=0.5, init="both_gaussian"))
    module = DPOLoss(model)
    for _ in range(2):
        module.train()
        trained = {name for name, training in modes(model).items() if training}
        assert trained == {name for name, _ in lora_modules(model)} and module.training
        with torch.no_grad():
            assert not torch.equal(*(module(**batch())["loss"] for _ in range(2)))
            module.eval()
            assert torch.equal(*(module(**batch())["loss"] for _ in range(2)))
    full = DPOLoss(inject(family("GPT2LMHeadModel"), FullConfig())).train()
    assert not any(modes(full.model).values())


def test_supervised_training_keeps_the_dropout_of_the_base():
    module = AnswerLoss(inject(family("GPT2LMHeadModel"), LoRAConfig(r=4))).train()
    assert all(modes(module).values())
    found = [module(batch()["input_ids"], batch()["labels"])["loss"] for _ in range(2)]
    assert not torch.equal(*found)


def test_checkpointing_is_for_gradients_and_only_once(monkeypatch):
    model = inject(tiny_model("llama"), LoRAConfig(r=4))
    layer, recomputed = model.model.layers[0], []
    enable_checkpointing(model)
    forward = layer.forward
    enable_checkpointing(model)
    assert layer.forward is forward
    layer.mlp.register_forward_pre_hook(lambda *_: recomputed.append(in_backward()))
    model(input_ids=tiny_batch()).logits.sum().backward()
    assert recomputed == [False, True]
    monkeypatch.setattr("lora_kernels.train.activation_checkpointing.checkpoint", None)
    with torch.no_grad():
        model(input_ids=tiny_batch())
    with pytest.raises(ValueError, match="gradient_checkpointing: Linear has no layers that can recompute activations"):
        enable_checkpointing(nn.Linear(2, 2))


def test_eval_mode_gives_every_part_its_mode_back():
    model = mixed(tiny_model("llama"))
    before = modes(model)
    with pytest.raises(KeyError), eval_mode(model):
        assert not any(modes(model).values())
        raise KeyError
    assert modes(model) == before and len(set(before.values())) == 2


def test_whatever_looks_at_a_model_in_training_leaves_its_modes():
    tokenizer, data = tiny_tokenizer(), pairs(4)
    model = attach_head(tiny_llama(attention_dropout=0.5))
    inject(model, LoRAConfig(r=4, lora_dropout=0.5, init="both_gaussian", modules_to_save=["score"]))
    loss, reward = DPOLoss(model), RewardModel(model)
    rows = data.batch(range(4))
    chats = [[{"role": "user", "content": "say one"}, {"role": "assistant", "content": "two"}]]
    ways = {
        "reference": lambda: loss.reference(rows["input_ids"], rows["labels"]).tolist(),
        "reference of full": lambda: loss.reference(rows["input_ids"], rows["labels"], adapters_on=True).tolist(),
        "evaluate": lambda: evaluate(loss, data, 2, make_accelerator()),
        "evaluate_pairs": lambda: evaluate_pairs(reward, data, 2).summary(),
        "score": lambda: reward.score_conversations(tokenizer, chats).tolist(),
        "generate": lambda: generate(model, tokenizer, ["say one"], 5),
        "check": lambda: loss.check(torch.arange(3, 9)),
    }
    mixed(loss)
    before = modes(loss)
    for name, look in ways.items():
        assert look() == look(), f"{name}: dropout"
        assert modes(loss) == before, name


@pytest.mark.parametrize("training", [True, False])
def test_a_module_to_save_with_dropout_is_in_the_mode_of_the_model_either_way(training):
    model = tiny_model("gpt2").train(training)
    model.transformer.h[1].mlp.dropout.p = 0.5
    inject(model, LoRAConfig(r=4, target_modules=["c_attn"], modules_to_save=["h.1.mlp"]))
    # The mode has changed since the original was set aside.
    for now in (not training, training):
        model.train(now)
        for dropout in (model.transformer.h[0].attn.resid_dropout, model.transformer.h[0].attn.attn_dropout):
            dropout.eval()
        with adapters_disabled(model):
            assert model.transformer.h[1].mlp.dropout.training is now
            found = [model.transformer.h[1].mlp(torch.ones(1, 32)) for _ in range(2)]
            assert torch.equal(*found) is not now
        assert model.transformer.h[1].mlp.dropout.training is now
    # A switch inside the block is one of what was set aside, too.
    with adapters_disabled(model):
        model.train(not training)
    assert model.transformer.h[1].mlp.dropout.training is not training
    assert set(modes(model).values()) == {not training}


def test_named_adapters_are_in_the_mode_of_the_model():
    model = tiny_model("gpt2").train()
    inject(model, LoRAConfig(r=4, target_modules=["c_attn"]))
    add_adapter(model, "other", LoRAConfig(r=2, target_modules=["c_proj"], modules_to_save=["h.1.mlp"]))
    model.eval()
    with use_adapter(model, "other"):
        assert not any(in_use(model).values())
        model.train()
    assert all(in_use(model).values())
