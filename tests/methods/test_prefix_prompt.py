"""Prefix and prompt tuning against PEFT, against attention written out in float64, and against each other's twin."""

import copy
import json
import math
import pickle
import warnings
from types import SimpleNamespace

import peft
import pytest
import torch
import transformers
from tiny_chat import tiny_llama, tiny_records, tiny_tokenizer
from tiny_models import VOCAB, logits, perturb, tiny_batch, tiny_model
from torch.nn import functional as F
from transformers import LlamaForSequenceClassification, StaticCache, T5Config, T5ForConditionalGeneration

from lora_kernels import (
    LoRAConfig,
    PrefixConfig,
    PromptConfig,
    adapters_disabled,
    inject,
    load_adapter,
    merge,
    save_adapter,
    trainable_summary,
)
from lora_kernels.data.dataset import build_dataset
from lora_kernels.train.causal_lm import AnswerLoss
from lora_kernels.train.config import SFTConfig
from lora_kernels.train.sft import run_sft, train_sft

KINDS = ["llama", "gpt2", "qwen2"]
CONFIGS = [PrefixConfig, PromptConfig]
N = 5


def with_tokens(config_class, kind="llama", std=0.5, dtype=torch.float32, **arguments):
    """A tiny model with virtual tokens that have moved."""
    model = inject(tiny_model(kind).to(dtype), config_class(num_virtual_tokens=N, **arguments))
    perturb(model, std)
    return model


def padded(rows, side):
    """(input_ids, attention_mask) of rows of different length, padded with token 0."""
    width = max(map(len, rows))
    before = [width - len(row) if side == "left" else 0 for row in rows]
    ids = [[0] * b + row + [0] * (width - len(row) - b) for b, row in zip(before, rows, strict=True)]
    mask = [[0] * b + [1] * len(row) + [0] * (width - len(row) - b) for b, row in zip(before, rows, strict=True)]
    return torch.tensor(ids), torch.tensor(mask)


ROWS = [[5, 17, 40, 9, 33, 21, 8], [11, 3, 60], [30, 31, 32, 50, 51]]


@torch.no_grad()
def real_logits(model, side, rows=ROWS, **arguments):
    """The logits [len(row), VOCAB] of each row, computed in one padded batch."""
    ids, mask = padded(rows, side)
    out = model(input_ids=ids, attention_mask=mask, **arguments).logits
    assert out.shape == (*ids.shape, VOCAB)
    return [out[i][mask[i].bool()] for i in range(len(rows))]


def llama_by_hand(model, row, key_values, input_embeddings=None):
    """Float64 logits of one row of the tiny Llama whose layers have `key_values` [n, 2·layers, heads, d] in front."""
    config, decoder, n = model.config, model.model, key_values.shape[0]
    heads, groups = config.num_attention_heads, config.num_attention_heads // config.num_key_value_heads
    d = config.hidden_size // heads
    x = decoder.embed_tokens.weight[torch.tensor(row)]
    T = len(row)
    angles = torch.arange(n, n + T)[:, None] / 10000 ** (torch.arange(0, d, 2) / d)
    cos, sin = angles.cos(), angles.sin()

    def rotate(z):
        first, second = z[..., : d // 2], z[..., d // 2 :]
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)

    def norm(z, weight):
        return z / (z.square().mean(-1, keepdim=True) + config.rms_norm_eps).sqrt() * weight

    for index, layer in enumerate(decoder.layers):
        z = norm(x, layer.input_layernorm.weight)
        q, k, v = (
            (z @ projection.weight.T).reshape(T, -1, d).transpose(0, 1)
            for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)
        )
        k = torch.cat([key_values[:, 2 * index].transpose(0, 1), rotate(k)], 1).repeat_interleave(groups, 0)
        v = torch.cat([key_values[:, 2 * index + 1].transpose(0, 1), v], 1).repeat_interleave(groups, 0)
        scores = rotate(q) @ k.transpose(1, 2) / math.sqrt(d)
        visible = torch.arange(n + T)[None] <= n + torch.arange(T)[:, None]
        weights = torch.where(visible, scores.exp(), 0)
        attended = (weights @ v) / weights.sum(-1, keepdim=True)
        x = x + attended.transpose(0, 1).reshape(T, -1) @ layer.self_attn.o_proj.weight.T
        z, mlp = norm(x, layer.post_attention_layernorm.weight), layer.mlp
        x = x + (F.silu(z @ mlp.gate_proj.weight.T) * (z @ mlp.up_proj.weight.T)) @ mlp.down_proj.weight.T
    return norm(x, decoder.norm.weight) @ model.lm_head.weight.T


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_prefix_is_keys_and_values_before_those_of_each_row(side):
    model = with_tokens(PrefixConfig, dtype=torch.float64, init="random")
    P = model.virtual_tokens.saved().detach()
    assert P.dtype == torch.float64 and P.shape == (N, 2 * 2 * 2 * 8)
    with torch.no_grad():
        want = [llama_by_hand(model, row, P.view(N, 4, 2, 8)) for row in ROWS]
        without = [llama_by_hand(model, row, P.view(N, 4, 2, 8)[:0]) for row in ROWS]
    assert (torch.cat(want) - torch.cat(without)).abs().max() > 0.05
    for got, row in zip(real_logits(model, side), want, strict=True):
        # The model's norms and rotary angles are float32 whatever its dtype.
        torch.testing.assert_close(got, row, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_is_embeddings_before_those_of_the_tokens(kind):
    model = with_tokens(PromptConfig, kind)
    base = tiny_model(kind)
    ids = tiny_batch()
    prompt = model.virtual_tokens.embeddings.detach()
    embeddings = torch.cat([prompt.expand(2, -1, -1), base.get_input_embeddings()(ids)], 1)
    with torch.no_grad():
        want = base(inputs_embeds=embeddings, output_hidden_states=True)
        got = model(input_ids=ids, output_hidden_states=True)
        same = [
            model(inputs_embeds=base.get_input_embeddings()(ids)).logits,
            model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits,
            model(input_ids=ids, position_ids=torch.arange(ids.shape[1])[None]).logits,
            model(input_ids=ids, return_dict=False)[0],
        ]
    torch.testing.assert_close(got.logits, want.logits[:, N:], rtol=0, atol=1e-6)
    for other in same:
        torch.testing.assert_close(other, got.logits, rtol=0, atol=1e-6)
    assert (got.logits - logits(base)).abs().max() > 0.01
    for mine, theirs in zip(got.hidden_states, want.hidden_states, strict=True):
        torch.testing.assert_close(mine, theirs[:, N:], rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("config_class", CONFIGS)
def test_padding_changes_no_row(config_class, kind):
    model = with_tokens(config_class, kind)
    alone = [logit for row in ROWS for logit in real_logits(model, "right", [row])]
    for side in ("left", "right"):
        for got, want in zip(real_logits(model, side), alone, strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=2e-6)
    _ids, mask = padded(ROWS, "left")
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    given = real_logits(model, "left", position_ids=positions, use_cache=False)
    for got, want in zip(given, alone, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=2e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("config_class", CONFIGS)
def test_generation_with_a_cache_in_batches(config_class, kind):
    def loud(model):
        """With answers that depend on what went before."""
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(8 if parameter.ndim > 1 else 1)
        return model

    model = inject(loud(tiny_model(kind)), config_class(num_virtual_tokens=N))
    perturb(model, 0.5)
    arguments = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    ids, mask = padded(ROWS, "left")
    cached = model.generate(input_ids=ids, attention_mask=mask, **arguments)
    plain = model.generate(input_ids=ids, attention_mask=mask, use_cache=False, **arguments)
    assert cached.tolist() == plain.tolist()
    assert len(set(map(tuple, cached[:, ids.shape[1] :].tolist()))) == 3
    for row, answer in zip(ROWS, cached[:, ids.shape[1] :].tolist(), strict=True):
        alone = model.generate(input_ids=torch.tensor([row]), **arguments)
        assert alone[0, len(row) :].tolist() == answer
        by_steps = list(row)
        for _ in range(8):
            with torch.no_grad():
                by_steps.append(model(input_ids=torch.tensor([by_steps])).logits[0, -1].argmax().item())
        assert by_steps[len(row) :] == answer
    beams = [
        model.generate(input_ids=ids, attention_mask=mask, num_beams=3, use_cache=c, **arguments) for c in (False, True)
    ]
    assert beams[0].tolist() == beams[1].tolist()
    with adapters_disabled(model):
        base = model.generate(input_ids=ids, attention_mask=mask, **arguments)
    assert base.tolist() == loud(tiny_model(kind)).generate(input_ids=ids, attention_mask=mask, **arguments).tolist()
    assert base.tolist() != cached.tolist()


@pytest.mark.parametrize("config_class", CONFIGS)
def test_a_cache_can_be_fed_step_by_step(config_class):
    model = with_tokens(config_class)
    ids, mask = padded(ROWS, "left")
    with torch.no_grad():
        whole = model(input_ids=ids, attention_mask=mask).logits
        first = model(input_ids=ids[:, :4], attention_mask=mask[:, :4], use_cache=True)
        second = model(input_ids=ids[:, 4:], attention_mask=mask, past_key_values=first.past_key_values)
    assert second.past_key_values.get_seq_length() == N + ids.shape[1]
    torch.testing.assert_close(second.logits, whole[:, 4:], rtol=0, atol=2e-6)


def gradients(model, ids, **arguments):
    model.zero_grad()
    model(input_ids=ids, labels=ids, **arguments).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("config_class", "arguments"),
    [(PrefixConfig, {}), (PrefixConfig, {"mlp_hidden": 6}), (PromptConfig, {})],
    ids=["prefix", "prefix_mlp", "prompt"],
)
@pytest.mark.filterwarnings("ignore:.*checkpointing")
def test_activation_checkpointing_keeps_the_gradients(config_class, arguments, kind):
    base = tiny_model(kind)
    for name in ("attn_pdrop", "embd_pdrop", "resid_pdrop"):
        setattr(base.config, name, 0.0)
    model = type(base)(base.config)
    inject(model, config_class(num_virtual_tokens=N, **arguments))
    perturb(model, 0.5)
    model.train()
    ids = tiny_batch()
    want = gradients(model, ids)
    assert all(gradient.abs().max() > 0 for gradient in want.values())
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    torch.testing.assert_close(gradients(model, ids), want, rtol=1e-5, atol=1e-8)

    # Two passes, of different batches, before one backward pass.
    gradients(model, ids)
    model(input_ids=ids[:1, :4], labels=ids[:1, :4]).loss.backward()
    apart = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    losses = [model(input_ids=part, labels=part).loss for part in (ids, ids[:1, :4])]
    sum(losses).backward()
    together = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-8)


_SHAPE = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0}
_LLAMA_LIKE = _SHAPE | {"intermediate_size": 48, "max_position_embeddings": 64}
OTHERS = {
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**_LLAMA_LIKE),  # another name for the cache
    "bloom": lambda: transformers.BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4),  # no positions
    "opt": lambda: transformers.OPTConfig(**_SHAPE, ffn_dim=48, word_embed_proj_dim=16, max_position_embeddings=64),
    "gemma2": lambda: transformers.Gemma2Config(  # layers with and without a window, heads wider than hidden / heads
        **_LLAMA_LIKE, num_key_value_heads=2, head_dim=16, sliding_window=30
    ),
}


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("config_class", CONFIGS)
@pytest.mark.filterwarnings("ignore:.*checkpointing")
def test_other_architectures(config_class, kind):
    """Padding, generation and checkpointing where the code of transformers differs from Llama's."""
    torch.manual_seed(0)
    config = OTHERS[kind]()
    config.dropout = 0.0
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6 if parameter.ndim > 1 else 1)
    inject(model, config_class(num_virtual_tokens=N))
    perturb(model, 0.3)
    alone = [logit for row in ROWS for logit in real_logits(model, "right", [row])]
    for side in ("left", "right"):
        for got, want in zip(real_logits(model, side), alone, strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    ids, mask = padded(ROWS, "left")
    arguments = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    cached, plain = (
        model.generate(input_ids=ids, attention_mask=mask, use_cache=use_cache, **arguments)
        for use_cache in (True, False)
    )
    assert cached.tolist() == plain.tolist()
    model.train()
    want = gradients(model, ids[:1])
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    torch.testing.assert_close(gradients(model, ids[:1]), want, rtol=1e-5, atol=1e-8)


_WINDOWED = _LLAMA_LIKE | {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 6}
# Layers that see few tokens back, or weigh them by their distance: what stands between virtual tokens and text counts.
NEAR_SIGHTED = {
    "mistral": lambda: transformers.MistralConfig(**_WINDOWED),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **_WINDOWED, query_pre_attn_scalar=8, layer_types=["sliding_attention", "full_attention"]
    ),
    "gpt_neo": lambda: transformers.GPTNeoConfig(
        vocab_size=VOCAB, hidden_size=32, num_layers=2, num_heads=4, intermediate_size=48, window_size=6,
        attention_types=[[["global", "local"], 1]], max_position_embeddings=64,
    ),
    "llama4": lambda: transformers.Llama4TextConfig(
        **_LLAMA_LIKE, num_key_value_heads=2, head_dim=8, intermediate_size_mlp=48, attention_chunk_size=6,
        num_local_experts=2, layer_types=["chunked_attention", "full_attention"],
    ),
    "mpt": lambda: transformers.MptConfig(vocab_size=VOCAB, d_model=32, n_heads=4, n_layers=2, max_seq_len=64),
}  # fmt: skip
LONG_ROWS = [ROWS[0] + ROWS[2], ROWS[1], ROWS[2] + ROWS[1]]


def read_numbers(text, add_special_tokens):
    """A tokenizer of texts that are token ids."""
    return SimpleNamespace(input_ids=list(map(int, text.split())))


def near_sighted(kind):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(NEAR_SIGHTED[kind]()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6 if parameter.ndim > 1 else 1)
    return model


@pytest.mark.parametrize("kind", NEAR_SIGHTED)
@pytest.mark.parametrize("config_class", CONFIGS)
def test_padding_is_not_between_virtual_tokens_and_text(config_class, kind):
    """Rows of a padded batch, and what follows them, are those of the base model on all tokens one after another."""
    base, ids = near_sighted(kind), [7, 12, 44, 40, 9]
    config = config_class(num_virtual_tokens=N, init="text", init_text=" ".join(map(str, ids)))
    model = inject(near_sighted(kind), config, read_numbers)
    with torch.no_grad():
        want = [base(input_ids=torch.tensor([ids + row])).logits[0, N:] for row in LONG_ROWS]
    for side in ("left", "right"):
        for use_cache in (False, True):
            for got, row in zip(real_logits(model, side, LONG_ROWS, use_cache=use_cache), want, strict=True):
                torch.testing.assert_close(got, row, rtol=1e-4, atol=1e-4)

    arguments = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    inputs, mask = padded(LONG_ROWS, "left")
    for use_cache in (False, True):
        got = model.generate(input_ids=inputs, attention_mask=mask, use_cache=use_cache, **arguments)
        for answer, row in zip(got[:, inputs.shape[1] :].tolist(), LONG_ROWS, strict=True):
            alone = base.generate(input_ids=torch.tensor([ids + row]), **arguments)
            assert answer == alone[0, N + len(row) :].tolist()

    # Fed in two parts that both have text of each row.
    with torch.no_grad():
        first = model(input_ids=inputs[:, :10], attention_mask=mask[:, :10], use_cache=True)
        second = model(input_ids=inputs[:, 10:], attention_mask=mask, past_key_values=first.past_key_values)
        for index, row in enumerate(want):
            torch.testing.assert_close(second.logits[index], row[10 - inputs.shape[1] :], rtol=1e-4, atol=1e-4)
        early = model(input_ids=inputs[:, :4], attention_mask=mask[:, :4], use_cache=True)
        with pytest.raises(ValueError, match="a row with nothing but padding in its first 4 tokens"):
            model(input_ids=inputs[:, 4:], attention_mask=mask, past_key_values=early.past_key_values)


@pytest.mark.parametrize("kind", ["llama", "mistral"])
@pytest.mark.parametrize("config_class", CONFIGS)
@pytest.mark.filterwarnings("ignore:.*checkpointing")
def test_gradients_of_a_batch_padded_on_the_left(config_class, kind):
    """The sum over the rows alone, with checkpointing and without, and two batches before one backward pass."""
    model = with_tokens(config_class) if kind == "llama" else inject(near_sighted(kind), config_class(N))

    def loss(rows):
        ids, mask = padded(rows, "left")
        logprobs = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.log_softmax(-1)[:, :-1]
        chosen = logprobs.gather(2, ids[:, 1:, None])[..., 0]
        return (chosen * mask[:, :-1]).sum()

    def gradient(*batches):
        model.zero_grad()
        sum(loss(rows) for rows in batches).backward()
        (parameter,) = [p for p in model.parameters() if p.requires_grad]
        return parameter.grad.clone()

    want = sum(gradient([row]) for row in LONG_ROWS)
    scale = {"rtol": 1e-4, "atol": 1e-5 * want.abs().max().item()}
    torch.testing.assert_close(gradient(LONG_ROWS), want, **scale)
    torch.testing.assert_close(gradient(LONG_ROWS[:2], LONG_ROWS[2:]), want, **scale)
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    torch.testing.assert_close(gradient(LONG_ROWS), want, **scale)
    torch.testing.assert_close(gradient(LONG_ROWS[:2], LONG_ROWS[2:]), want, **scale)


@pytest.mark.parametrize("config_class", CONFIGS)
def test_a_prefix_longer_than_the_window(config_class):
    base, ids = near_sighted("gemma3"), [7, 12, 44, 40, 9, 15, 28, 3, 50]
    config = config_class(num_virtual_tokens=9, init="text", init_text=" ".join(map(str, ids)))
    model = inject(near_sighted("gemma3"), config, read_numbers)
    with torch.no_grad():
        want = [base(input_ids=torch.tensor([ids + row])).logits[0, 9:] for row in LONG_ROWS]
    for use_cache in (False, True):
        for got, row in zip(real_logits(model, "left", LONG_ROWS, use_cache=use_cache), want, strict=True):
            torch.testing.assert_close(got, row, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("config_class", CONFIGS)
def test_hidden_states_attentions_and_router_logits_are_the_real_tokens(config_class):
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        **_LLAMA_LIKE, num_key_value_heads=2, head_dim=8, num_local_experts=4, attn_implementation="eager"
    )
    model = inject(transformers.MixtralForCausalLM(config).eval(), config_class(N))
    perturb(model, 0.5)

    def outputs(rows, side):
        ids, mask = padded(rows, side)
        with torch.no_grad():
            return model(
                input_ids=ids, attention_mask=mask, labels=ids, output_hidden_states=True, output_attentions=True,
                output_router_logits=True,
            )  # fmt: skip

    batch = outputs(ROWS, "left")
    width = max(map(len, ROWS))
    for index, row in enumerate(ROWS):
        alone = outputs([row], "left")
        for got, want in zip(batch.hidden_states, alone.hidden_states, strict=True):
            torch.testing.assert_close(got[index, -len(row) :], want[0], rtol=0, atol=1e-5)
        for got, want in zip(batch.attentions, alone.attentions, strict=True):
            assert got.shape[2:] == (width, N + width)
            got = got[index, :, -len(row) :, -len(row) - N :]
            torch.testing.assert_close(got, want[0], rtol=0, atol=1e-6)
        for got, want in zip(batch.router_logits, alone.router_logits, strict=True):
            torch.testing.assert_close(got.view(3, width, -1)[index, -len(row) :], want, rtol=0, atol=1e-5)
    torch.testing.assert_close(batch.aux_loss, outputs(ROWS, "right").aux_loss)


@pytest.mark.parametrize("config_class", CONFIGS)
def test_compiled_it_is_the_same(config_class):
    """torch.compile looks at no hook when it asks whether what it has compiled fits a model."""

    def compiled(model, **arguments):
        return torch.compile(model, backend="eager", **arguments)

    def tuned(model):
        torch.manual_seed(3)
        inject(model, config_class(num_virtual_tokens=N))
        perturb(model, 0.5)
        return model

    def frozen():
        torch.manual_seed(0)
        config = transformers.LlamaConfig(**_LLAMA_LIKE | {"num_hidden_layers": 1})
        return transformers.LlamaForCausalLM(config).eval().requires_grad_(False)

    base, want = logits(frozen()), logits(tuned(frozen()))
    assert (want - base).abs().max() > 0.01

    torch._dynamo.reset()
    other = compiled(frozen())
    assert torch.equal(logits(other), base)
    model = tuned(frozen())
    assert torch.equal(logits(compiled(model)), want)
    assert torch.equal(logits(other), base)
    assert torch.equal(logits(compiled(copy.deepcopy(model), fullgraph=True)), want)
    with adapters_disabled(model):
        assert torch.equal(logits(compiled(model)), base)
    with torch.no_grad():
        model.virtual_tokens.saved().neg_()
    assert torch.equal(logits(compiled(model)), logits(model)) and not torch.equal(logits(model), want)

    torch._dynamo.reset()
    model = frozen()
    whole = compiled(model)
    assert torch.equal(logits(whole), base)
    assert torch.equal(logits(tuned(model)), want) and torch.equal(logits(whole), want)

    torch._dynamo.reset()
    model = frozen()
    for part in (model.model, model.model.layers[0].self_attn):
        part.compile(backend="eager")
    assert torch.equal(logits(model), base) and torch.equal(logits(tuned(model)), want)
    torch._dynamo.reset()


REFUSED = {
    "cpmant": (
        lambda: transformers.CpmAntConfig(
            vocab_size=VOCAB, hidden_size=32, num_attention_heads=4, dim_head=8, dim_ff=48, num_hidden_layers=1,
            prompt_length=4, prompt_types=4, segment_types=4,
        ),
        "CpmAntForCausalLM, which caches 9 keys for 5 tokens",
        "CpmAntForCausalLM, whose decoder doesn't run with virtual tokens: AttributeError",
    ),
    "bart": (
        lambda: transformers.BartConfig(
            vocab_size=VOCAB, d_model=32, decoder_layers=1, decoder_attention_heads=4, decoder_ffn_dim=48
        ),
        "BartForCausalLM, the decoder of an encoder-decoder",
        "BartForCausalLM, the decoder of an encoder-decoder",
    ),
    "roberta": (
        lambda: transformers.RobertaConfig(
            vocab_size=VOCAB, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, is_decoder=True
        ),
        "RobertaForCausalLM, whose positions depend on the padding token",
        "RobertaForCausalLM, whose positions depend on the padding token",
    ),
    "roformer": (
        lambda: transformers.RoFormerConfig(**_LLAMA_LIKE, is_decoder=True),
        "RoFormerForCausalLM, whose cached keys depend on the padding before a token",
        None,
    ),
    "gemma3n": (
        lambda: transformers.Gemma3nTextConfig(
            **_LLAMA_LIKE, num_key_value_heads=2, head_dim=8, vocab_size_per_layer_input=VOCAB, laurel_rank=4,
            hidden_size_per_layer_input=8, altup_num_inputs=2, activation_sparsity_pattern=[0.0, 0.0],
            num_kv_shared_layers=1, layer_types=["full_attention", "full_attention"],
        ),
        None,  # as its keys and values are of one shape
        "Gemma3nForCausalLM with hidden_size_per_layer_input",
    ),
    "deepseek_v3": (
        lambda: transformers.DeepseekV3Config(
            **_LLAMA_LIKE, num_key_value_heads=4, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4,
            v_head_dim=8, first_k_dense_replace=2,
        ),
        "DeepseekV3ForCausalLM whose layers cache .* one shape in every layer",
        None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_models_that_cannot_are_refused_and_left_as_they_are(kind):
    config, *messages = REFUSED[kind]
    model = transformers.AutoModelForCausalLM.from_config(config()).eval()
    modules, classes = dict(model.named_modules()), [type(module) for module in model.modules()]
    trained = [p.requires_grad for p in model.parameters()]
    for config_class, message in zip(CONFIGS, messages, strict=True):
        if message is None:
            assert logits(inject(copy.deepcopy(model), config_class(num_virtual_tokens=N))).isfinite().all()
            continue
        with pytest.raises(ValueError, match=f"model is a {message}"):
            inject(model, config_class(num_virtual_tokens=N))
        assert dict(model.named_modules()) == modules and [type(module) for module in model.modules()] == classes
        assert not any(m._forward_pre_hooks or m._forward_hooks for m in modules.values())
        assert [p.requires_grad for p in model.parameters()] == trained and not hasattr(model, "adapter_config")


@pytest.mark.parametrize("config_class", CONFIGS)
def test_a_model_can_be_pickled_as_before(config_class):
    model = with_tokens(config_class)
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(logits(again), logits(model)) and repr(again) == repr(model)


def peft_config(config_class, **arguments):
    kind = peft.PrefixTuningConfig if config_class is PrefixConfig else peft.PromptTuningConfig
    return kind(task_type="CAUSAL_LM", num_virtual_tokens=N, **arguments)


def load_with_peft(model, directory):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected).*")
        return peft.PeftModel.from_pretrained(model, directory).eval()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("config_class", CONFIGS)
def test_peft_loads_what_we_save_and_the_other_way_round(config_class, kind, tmp_path):
    model = with_tokens(config_class, kind)
    want = logits(model)
    assert (want - logits(tiny_model(kind))).abs().max() > 0.01
    save_adapter(model, tmp_path / "ours")
    theirs = load_with_peft(tiny_model(kind), tmp_path / "ours")
    torch.testing.assert_close(logits(theirs)[:, -9:], want, rtol=0, atol=1e-5)
    arguments = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert theirs.generate(input_ids=tiny_batch(), **arguments).tolist() == (
        model.generate(tiny_batch(), **arguments).tolist()
    )
    again = load_adapter(tiny_model(kind), tmp_path / "ours", trainable=False)
    assert torch.equal(logits(again), want) and not any(p.requires_grad for p in again.parameters())

    torch.manual_seed(4)
    made_by_peft = peft.get_peft_model(tiny_model(kind), peft_config(config_class)).eval()
    made_by_peft.save_pretrained(tmp_path / "peft")
    want = logits(made_by_peft)[:, -9:]
    loaded = load_adapter(tiny_model(kind), tmp_path / "peft")
    torch.testing.assert_close(logits(loaded), want, rtol=0, atol=1e-5)
    load_adapter(model, tmp_path / "peft")
    torch.testing.assert_close(logits(model), want, rtol=0, atol=1e-5)
    assert trainable_summary(loaded).trainable == loaded.virtual_tokens.saved().numel()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("config_class", CONFIGS)
def test_gradients_are_pefts(config_class, kind, tmp_path):
    model = with_tokens(config_class, kind)
    theirs = peft.get_peft_model(tiny_model(kind), peft_config(config_class)).eval()
    weight = theirs.prompt_encoder["default"].embedding.weight
    with torch.no_grad():
        weight.copy_(model.virtual_tokens.saved())
    # Not with labels: PEFT's last virtual token of a prompt is asked for the first real one, ours is not.
    for adapted in (theirs, model):
        predicted = adapted(input_ids=tiny_batch()).logits[:, -9:]
        F.cross_entropy(predicted.flatten(0, 1), tiny_batch().flatten()).backward()
    got = model.virtual_tokens.saved().grad
    assert got.abs().max() > 1e-5
    torch.testing.assert_close(got, weight.grad, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("kind", KINDS)
def test_the_reparametrised_prefix_is_pefts_and_is_saved_without_it(kind, tmp_path):
    model = inject(tiny_model(kind), PrefixConfig(num_virtual_tokens=N, init="zero", mlp_hidden=7))
    assert not model.virtual_tokens.saved().any()
    perturb(model, 0.3)
    projection = {"prefix_projection": True, "encoder_hidden_size": 7, "init_weights": "zero"}
    theirs = peft.get_peft_model(tiny_model(kind), peft_config(PrefixConfig, **projection)).eval()
    encoder, ours = theirs.prompt_encoder["default"], model.virtual_tokens
    pairs = [(ours.embeddings, encoder.embedding.weight)]
    pairs += list(zip(ours.mlp.parameters(), encoder.transform.parameters(), strict=True))
    with torch.no_grad():
        for mine, other in pairs:
            other.copy_(mine)
    torch.testing.assert_close(logits(model), logits(theirs), rtol=0, atol=1e-6)
    ids = tiny_batch()
    gradients(model, ids)
    theirs(input_ids=ids, labels=ids).loss.backward()
    for mine, other in pairs:
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-8)

    save_adapter(model, tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "peft")
    for directory in ("ours", "peft"):
        loaded = load_adapter(tiny_model(kind), tmp_path / directory)
        assert loaded.virtual_tokens.mlp is None
        torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="can't be put back into the model's mlp_hidden"):
        load_adapter(model, tmp_path / "ours")


@pytest.mark.parametrize("words", ["the cat says", "one two three four five red green blue apple pear plum"])
@pytest.mark.parametrize("arguments", [(PrefixConfig, {}), (PrefixConfig, {"mlp_hidden": 4}), (PromptConfig, {})])
def test_text_starts_as_if_the_text_came_first(arguments, words):
    config_class, extra = arguments
    tokenizer, base = tiny_tokenizer(), tiny_llama().eval()
    ids = tokenizer(words, add_special_tokens=False).input_ids
    front = torch.tensor((ids * N)[:N])
    config = config_class(num_virtual_tokens=N, init="text", init_text=words, **extra)
    model = inject(tiny_llama().eval(), config, tokenizer)
    with torch.no_grad():
        want = base(input_ids=torch.cat([front.expand(2, -1), tiny_batch()], 1)).logits[:, N:]
    torch.testing.assert_close(logits(model), want, rtol=1e-5, atol=1e-5)
    assert (want - logits(base)).abs().max() > 0.1


def test_initial_values():
    model = inject(tiny_model("llama"), PromptConfig(num_virtual_tokens=7))
    table = model.get_input_embeddings().weight
    assert all((table == row).all(1).any() for row in model.virtual_tokens.embeddings)
    table.data.mul_(50)
    random = inject(tiny_model("llama"), PromptConfig(num_virtual_tokens=60, init="random")).virtual_tokens.embeddings
    assert 0.8 < random.std() / tiny_model("llama").get_input_embeddings().weight.std() < 1.2
    prefix = inject(tiny_model("llama"), PrefixConfig(num_virtual_tokens=50, init="random")).virtual_tokens
    assert 0.018 < prefix.saved().std() < 0.022
    half = inject(tiny_model("llama").to(torch.bfloat16), PrefixConfig(num_virtual_tokens=3))
    assert half.virtual_tokens.saved().dtype == torch.float32
    assert logits(half).dtype == torch.bfloat16


def test_zero_tokens_stay_equal_unless_reparametrised():
    """As the docstring of PrefixConfig says; so "zero" is not the default."""
    for mlp_hidden in (None, 4):
        model = inject(tiny_model("llama"), PrefixConfig(num_virtual_tokens=N, init="zero", mlp_hidden=mlp_hidden))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for _ in range(3):
            gradients(model, tiny_batch())
            optimizer.step()
        P = model.virtual_tokens.saved()
        assert P.abs().max() > 0.01
        assert torch.allclose(P, P[:1].expand(N, -1), atol=1e-4) == (mlp_hidden is None)


@pytest.mark.parametrize("config_class", CONFIGS)
def test_disabled_it_is_the_base_model_and_copies_are_apart(config_class):
    model, base = with_tokens(config_class), logits(tiny_model("llama"))
    want = logits(model)
    with adapters_disabled(model):
        with adapters_disabled(model):
            assert torch.equal(logits(model), base)
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), want)
    model(input_ids=tiny_batch())
    twin = copy.deepcopy(model)
    with torch.no_grad():
        model.virtual_tokens.saved().zero_()
    assert torch.equal(logits(twin), want) and not torch.equal(logits(model), want)
    with pytest.raises(ValueError, match="can't be merged"):
        merge(model)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == (
        ["virtual_tokens.key_values" if config_class is PrefixConfig else "virtual_tokens.embeddings"]
    )


@pytest.mark.parametrize("config_class", CONFIGS)
def test_what_does_not_fit_is_refused_by_name(config_class, tmp_path):
    base = tiny_model("llama")
    for n in (64, 100):
        with pytest.raises(ValueError, match=f"num_virtual_tokens is {n}; allowed: less than .* context of 64 tokens"):
            inject(base, config_class(num_virtual_tokens=n))
    for n in (0, -1, 2.5, True, None):
        with pytest.raises(ValueError, match="num_virtual_tokens is"):
            config_class(num_virtual_tokens=n)
    for arguments, message in (
        ({"init": "gaussian"}, "init is 'gaussian'; allowed: vocab, text, random"),
        ({"init": "text"}, "init_text is empty"),
        ({"init_text": "a"}, 'init_text needs init="text"'),
    ):
        with pytest.raises(ValueError, match=message):
            config_class(**arguments)
    with pytest.raises(ValueError, match="tokenizer is None"):
        inject(base, config_class(init="text", init_text="red"))
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
    for wrong in (torch.nn.Linear(2, 2), t5):
        with pytest.raises(ValueError, match=f"model is a {type(wrong).__name__}; allowed: a Hugging Face causal"):
            inject(wrong, config_class())
    mamba = transformers.MambaForCausalLM(transformers.MambaConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1))
    with pytest.raises(ValueError, match="model is a MambaForCausalLM, which takes no key-value cache"):
        inject(mamba, config_class())
    with pytest.raises(TypeError, match="config is a dict; allowed: AdaLoRAConfig, FullConfig, LoRAConfig, PrefixConf"):
        inject(base, {})
    with pytest.raises(ValueError, match="no adapter_config"):
        save_adapter(base, tmp_path)
    assert torch.equal(logits(base), logits(tiny_model("llama"))) and all(p.requires_grad for p in base.parameters())

    model = with_tokens(config_class)
    with pytest.raises(ValueError, match=f"already carries what {config_class.__name__} put in"):
        inject(model, LoRAConfig())
    ids = tiny_batch()
    with pytest.raises(ValueError, match=r"attention_mask is \[2, 14\]; allowed with virtual tokens: \[batch, 9\]"):
        model(input_ids=ids, attention_mask=torch.ones(2, 9 + N))
    with pytest.raises(ValueError, match="is a StaticCache"):
        model(input_ids=ids, past_key_values=StaticCache(model.config, max_cache_len=32))
    with adapters_disabled(model):
        foreign = model(input_ids=ids[:, :3], use_cache=True).past_key_values
    with pytest.raises(ValueError, match="holds 3 tokens, fewer than the 5 virtual ones"):
        model(input_ids=ids[:, 3:4], past_key_values=foreign)

    save_adapter(model, tmp_path / "a")
    other = CONFIGS[1 - CONFIGS.index(config_class)]
    with pytest.raises(ValueError, match=f"{other.__name__}"):
        load_adapter(with_tokens(other), tmp_path / "a")
    with pytest.raises(ValueError, match="with 5 virtual tokens, the model has a .* with 4"):
        load_adapter(inject(tiny_model("llama"), config_class(num_virtual_tokens=4)), tmp_path / "a")
    larger = tiny_llama(hidden_size=64)
    with pytest.raises(ValueError, match="prompt_embeddings has shape"):
        load_adapter(larger, tmp_path / "a")
    assert not hasattr(larger, "virtual_tokens")
    raw = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    for change, message in (
        ({"num_transformer_submodules": 2}, "num_transformer_submodules is 2"),
        ({"modules_to_save": ["score"]}, "modules_to_save is"),
        ({"num_virtual_tokens": None}, "num_virtual_tokens is None"),
        ({"peft_type": "P_TUNING"}, "peft_type is 'P_TUNING'; supported: 'ADALORA', 'LORA', .*'PROMPT_TUNING'"),
    ):
        (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(raw | change))
        with pytest.raises(ValueError, match=message):
            load_adapter(tiny_model("llama"), tmp_path / "a")


@pytest.mark.parametrize("config_class", CONFIGS)
def test_a_classifier_whose_head_would_stay_as_it_is_is_refused(config_class):
    model = LlamaForSequenceClassification(tiny_model("llama_classifier").config).eval()
    with pytest.raises(ValueError, match="LlamaForSequenceClassification; allowed: a Hugging Face causal language"):
        inject(model, config_class(num_virtual_tokens=N))


TINY_RUN = {"model": "tiny", "data": "tiny", "max_steps": 6, "batch_size": 4, "save_steps": 2, "num_virtual_tokens": 4}
METHOD_RUNS = [
    {"method": "prefix"},
    {"method": "prefix", "mlp_hidden": 6, "gradient_checkpointing": True},
    {"method": "prompt"},
]


def tiny_dataset(count=22):
    return build_dataset([(r, f"data:{i}") for i, r in enumerate(tiny_records(count))], tiny_tokenizer(), 128, "data")


@pytest.mark.parametrize("changes", METHOD_RUNS, ids=["prefix", "prefix_mlp", "prompt"])
def test_the_trainer_continues_a_killed_run_exactly(changes, tmp_path):
    class KilledError(Exception):
        pass

    def die(record):
        if record["step"] == 3:
            raise KilledError

    def train(out, callbacks=(), **more):
        torch.manual_seed(2)
        model = tiny_llama()
        mlp_hidden = {"mlp_hidden": changes["mlp_hidden"]} if "mlp_hidden" in changes else {}
        inject(model, (PrefixConfig if changes["method"] == "prefix" else PromptConfig)(4, **mlp_hidden))
        config = SFTConfig(**TINY_RUN | changes | more, output_dir=str(out))
        result = train_sft(model, tiny_dataset(), None, config, callbacks=callbacks, progress=False)
        return model.virtual_tokens.saved().detach(), result

    want, whole = train(tmp_path / "whole")
    with pytest.raises(KilledError):
        train(tmp_path / "cut", callbacks=[die])
    got, resumed = train(tmp_path / "cut", resume=True)
    assert torch.equal(got, want) and (resumed.steps, resumed.loss) == (whole.steps, whole.loss)


@pytest.mark.parametrize("changes", METHOD_RUNS, ids=["prefix", "prefix_mlp", "prompt"])
def test_run_from_files_moves_the_held_out_loss(changes, tmp_path):
    tiny_llama().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "train.json").write_text(json.dumps(tiny_records(22)))
    files = {"model": "model", "data": "train.json", "eval_data": "train.json", "output_dir": "out"}
    files = {name: str(tmp_path / path) for name, path in files.items()}
    config = SFTConfig(**TINY_RUN | changes | files | {"dtype": "float32", "max_steps": 15, "lr": 3e-2})
    base = AnswerLoss(tiny_llama().eval())
    dataset = tiny_dataset()
    batch = dataset.batch(range(len(dataset)))
    with torch.no_grad():
        before = base(**batch)["loss"].item() / int(dataset.loss_counts.sum())
    result = run_sft(config, progress=False)
    assert result.eval_loss < before - 0.1
    loaded = AnswerLoss(load_adapter(tiny_llama(), tmp_path / "out").eval())
    with torch.no_grad():
        after = loaded(**batch)["loss"].item() / int(dataset.loss_counts.sum())
    assert after == pytest.approx(result.best_eval_loss, rel=1e-5)


def test_the_virtual_tokens_count_towards_the_context(tmp_path):
    model = tiny_llama(max_position_embeddings=32)
    inject(model, PrefixConfig(num_virtual_tokens=20))
    config = SFTConfig(**TINY_RUN | {"num_virtual_tokens": 20}, method="prefix", output_dir=str(tmp_path))
    with pytest.raises(ValueError, match=r"num_virtual_tokens 20 and the longest row of \d+ tokens exceed .* of 32"):
        train_sft(model, tiny_dataset(), None, config, progress=False)


def test_settings_depend_on_the_method():
    def config(**arguments):
        return SFTConfig(model="m", data="d", **arguments)

    found = {m: (config(method=m).lr, config(method=m).init, config(method=m).target) for m in ("prefix", "prompt")}
    assert found == {"prefix": (5e-3, "vocab", None), "prompt": (3e-2, "vocab", None)}
    assert (config().lr, config().init, config().target) == (2e-4, "default", "all-linear")
    assert config(method="prompt", lr=0.3).lr == 0.3
    for arguments, message in (
        ({"method": "prefix", "target": "q_proj"}, "target must be left out with method prefix"),
        ({"method": "prompt", "mlp_hidden": 8}, "mlp_hidden must be left out with method prompt"),
        ({"init_text": "red"}, "init_text must be left out with method lora"),
        ({"method": "prefix", "num_virtual_tokens": 0}, "num_virtual_tokens must be >= 1"),
    ):
        with pytest.raises(ValueError, match=message):
            config(**arguments)
    with pytest.raises(ValueError, match="init is 'zero'; allowed: vocab, text, random"):
        run_sft(config(method="prompt", init="zero"))
