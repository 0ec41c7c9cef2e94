"""Randomly initialised transformers models of a few thousand parameters, for tests that need a real architecture."""

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

VOCAB = 61
_LLAMA = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def tiny_model(kind: str, tied: bool = False, **sizes: int) -> PreTrainedModel:
    """kind: llama (GQA), qwen2 (biases), gpt2 (Conv1D), llama_classifier. Equal on each call; in eval mode.

    `sizes` are settings of the config in place of qwen2's own.
    """
    torch.manual_seed(11)
    if kind == "gpt2":
        config = GPT2Config(
            vocab_size=VOCAB, n_positions=64, n_embd=32, n_layer=2, n_head=4, tie_word_embeddings=tied,
            bos_token_id=1, eos_token_id=2,
        )  # fmt: skip
        model = GPT2LMHeadModel(config)
    elif kind == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**{**_LLAMA, **sizes}, tie_word_embeddings=tied))
    elif kind == "llama":
        model = LlamaForCausalLM(LlamaConfig(**_LLAMA, tie_word_embeddings=tied))
    elif kind == "llama_classifier":
        model = LlamaForSequenceClassification(LlamaConfig(**_LLAMA, num_labels=1))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    return model.eval()


def in_backward():
    """Whether a module that runs now is recomputed by autograd."""
    return torch._C._current_graph_task_id() != -1


def tiny_batch() -> torch.Tensor:
    """input_ids [2, 9]."""
    return torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(input_ids=tiny_batch()).logits


@torch.no_grad()
def perturb(model: torch.nn.Module, std: float = 0.2) -> None:
    """Stands in for training: moves every trainable parameter."""
    generator = torch.Generator().manual_seed(17)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(std * torch.randn(parameter.shape, generator=generator))
