"""Adapters made and read by PEFT, on the models of tiny_models."""

import warnings

import peft
import torch
from tiny_models import logits, perturb, tiny_model


def assert_same_logits(got, want):
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def load_with_peft(model, directory):
    """PEFT warns, and goes on, when a tensor of the file has no place in the model or the other way round."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected).*")
        return peft.PeftModel.from_pretrained(model, directory).eval()


def peft_adapter(kind, directory, std=0.1, **arguments):
    """An adapter that PEFT made, moved and saved; returns PEFT's logits."""
    torch.manual_seed(5)
    model = peft.get_peft_model(tiny_model(kind), peft.LoraConfig(**arguments)).eval()
    perturb(model, std)
    model.save_pretrained(directory)
    return logits(model)
