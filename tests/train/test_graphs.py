"""The decoder as CUDA graphs, with torch's graphs played on the CPU: memory that every replay writes anew."""

from types import SimpleNamespace

import pytest
import torch
from tiny_chat import tiny_llama
from tiny_sft import losses, settings, train_tiny

from lora_kernels import LoRAConfig, inject
from lora_kernels.backends import choice as strategy
from lora_kernels.train import sft
from lora_kernels.train.causal_lm import AnswerLoss
from lora_kernels.train.graphs import DecoderGraphs, check_graphs


@pytest.fixture
def captured(monkeypatch):
    """The shapes of which a graph was made."""
    shapes = []

    def make_graphed_callables(module, sample_args, allow_unused_input, pool):
        (sample,) = sample_args
        shapes.append(tuple(sample.shape))
        assert strategy._for_graphs
        # As warming up would, which must not show.
        torch.rand(100)
        parameters = tuple(module.parameters())
        trained = [p for p in parameters if p.requires_grad]
        memory = {id(p): torch.full_like(p, torch.nan) for p in trained}
        hidden = torch.full_like(module(sample).detach(), torch.nan)

        class Replay(torch.autograd.Function):
            @staticmethod
            def forward(ctx, input_ids, *_):
                assert input_ids.shape == sample.shape
                sample.copy_(input_ids)
                with torch.enable_grad():
                    ctx.output = module(sample)
                return hidden.copy_(ctx.output.detach()).detach()

            @staticmethod
            def backward(ctx, grad):
                for p, new in zip(trained, torch.autograd.grad(ctx.output, trained, grad), strict=True):
                    memory[id(p)].copy_(new)
                return None, *(memory[id(p)].detach() if p.requires_grad else None for p in parameters)

        return lambda input_ids: Replay.apply(input_ids, *parameters)

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", make_graphed_callables)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: torch.get_rng_state())
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: torch.set_rng_state(state))
    return shapes


def adapted(**options):
    torch.manual_seed(1)
    return inject(tiny_llama(), LoRAConfig(r=4, init="b_gaussian", **options)).train()


def test_losses_and_gradients_are_those_of_the_decoder(captured):
    model = adapted()
    trained = [p for p in model.parameters() if p.requires_grad]
    loss_of = AnswerLoss(model)
    decoder_graphs = DecoderGraphs(loss_of.parts[0], longest=60)

    def results(ids, graphs):
        loss_of.graphs = graphs
        loss = loss_of(ids, ids)["loss"]
        loss.backward()
        grads = [p.grad.clone() for p in trained]
        model.zero_grad(set_to_none=True)
        return [loss.detach(), *grads]

    for length in (60, 3, 57, 8, 60, 5, 58, 7, 59):
        ids = torch.randint(64, (2, length))
        for found, expected in zip(results(ids, decoder_graphs), results(ids, None), strict=True):
            assert (found - expected).norm() <= 1e-5 * expected.norm()
    assert captured == [(2, 64), (2, 8)], "the third batch of a shape makes its graph, one of at most eight lengths"


def test_evaluation_goes_without_a_graph(captured):
    model = adapted()
    loss_of = AnswerLoss(model)
    loss_of.graphs = DecoderGraphs(loss_of.parts[0], longest=8)
    ids = torch.randint(64, (2, 8))
    for _ in range(4):
        loss_of.eval()
        loss_of(ids, ids)
        loss_of.train()
        with torch.no_grad():
            loss_of(ids, ids)
    assert not captured


def test_a_run_with_graphs_is_the_run_without(tmp_path, captured, monkeypatch):
    monkeypatch.setattr(sft, "check_graphs", lambda accelerator: None)
    options = dict(batch_size=2, epochs=4)
    expected, _ = train_tiny(tmp_path / "without", **options)
    found, _ = train_tiny(tmp_path / "with", cuda_graphs=True, **options)
    assert captured
    assert losses(tmp_path / "with") == pytest.approx(losses(tmp_path / "without"), rel=1e-5)
    for (name, p), q in zip(found.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6, msg=name)


def test_what_it_refuses(tmp_path):
    for changes, message in (
        ({"method": "adalora"}, "method must be one of dora, full, lora, qlora with cuda_graphs, got 'adalora'"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps must be 1 with cuda_graphs, got 2"),
        ({"gradient_checkpointing": True}, "gradient_checkpointing must be left out with cuda_graphs, got True"),
    ):
        with pytest.raises(ValueError, match=message):
            settings(tmp_path, cuda_graphs=True, **changes)
    for device, processes in (("cpu", 1), ("cuda", 2)):
        accelerator = SimpleNamespace(device=torch.device(device), num_processes=processes)
        with pytest.raises(ValueError, match=f"one process on a CUDA GPU, not {processes} on {device}"):
            check_graphs(accelerator)
    check_graphs(SimpleNamespace(device=torch.device("cuda"), num_processes=1))
    decoder = tiny_llama().model
    DecoderGraphs(decoder, longest=8)
    decoder.config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0}
    with pytest.raises(ValueError, match="rotary embedding depends.*dynamic"):
        DecoderGraphs(decoder, longest=8)
    with pytest.raises(ValueError, match="cuda_graphs needs one process on a CUDA GPU"):
        train_tiny(tmp_path, cuda_graphs=True)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_an_interrupted_run_is_the_same(tmp_path, captured, monkeypatch):
    """With dropout, though the batches that go without a graph are others."""
    monkeypatch.setattr(sft, "check_graphs", lambda accelerator: None)
    options = dict(batch_size=2, lora_dropout=0.3, cuda_graphs=True, save_steps=5, lr_scheduler="constant")
    options["warmup_ratio"] = 0.0
    train_tiny(tmp_path / "whole", max_steps=15, **options)

    def stop(record):
        if record["step"] == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_tiny(tmp_path / "parts", max_steps=15, callbacks=[stop], **options)
    train_tiny(tmp_path / "parts", max_steps=15, resume=True, **options)
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)


def test_padding_stays_in_the_context(captured):
    decoder = adapted().model
    decoder.config.max_position_embeddings = 50
    graphs = DecoderGraphs(decoder, longest=50)
    for length in (50, 41, 30, 50):
        assert graphs(torch.randint(64, (1, length))).shape[1] == length
    assert set(graphs._seen) == {(1, 50), (1, 48), (1, 32)}


def test_gradients_have_to_be_none(captured):
    decoder = adapted().model
    graphs, ids = DecoderGraphs(decoder, longest=8), torch.randint(64, (1, 8))
    graphs(ids).sum().backward()
    with pytest.raises(RuntimeError, match="a gradient is not None"):
        graphs(ids)


def test_attention_keeps_its_causal_path(captured, monkeypatch):
    """While a graph is captured transformers can't see that a row is one sequence."""
    from transformers import masking_utils

    monkeypatch.setattr(masking_utils, "is_tracing", lambda tensor=None: True)
    masks, attend = [], torch.nn.functional.scaled_dot_product_attention

    def spy(*args, attn_mask=None, **options):
        masks.append(attn_mask)
        return attend(*args, attn_mask=attn_mask, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    decoder = adapted().model
    graphs, ids = DecoderGraphs(decoder, longest=8), torch.randint(64, (1, 8))
    graphs(ids), graphs(ids)
    assert masks and all(mask is not None for mask in masks), "the test sees the mask that is avoided"
    masks.clear()
    graphs._capture(ids)
    assert masks and all(mask is None for mask in masks)


def test_making_a_graph_takes_no_random_numbers(captured):
    decoder = adapted(lora_dropout=0.5).get_decoder()
    ids = torch.randint(64, (2, 8))

    def draws(run):
        torch.manual_seed(0)
        for _ in range(4):
            run(ids)
        return torch.rand(3)

    eager = draws(lambda ids: decoder(input_ids=ids).last_hidden_state)
    assert torch.equal(draws(DecoderGraphs(decoder, longest=8)), eager) and captured == [(2, 8)]
