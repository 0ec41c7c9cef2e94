"""What a training run has to write, from its settings alone: the papers' formulas in float64.

Nothing here calls the trainers. What is theirs by definition, so that a resumed run is exact, is repeated: how the seed
gives initial values and the order of rows. Only NF4 is taken from the package (tests/ops/test_nf4.py has its
definition).
"""

import dataclasses
import datetime
import functools
import json
import math
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from lora_kernels import quantize_nf4
from lora_kernels.methods.virtual_tokens import cache_argument

LINEARS = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
           "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]  # fmt: skip
CHATML, PLAIN = "<|im_start|>{role}\n{content}<|im_end|>\n", "{role}: {content}<|im_end|>\n\n"


class Mismatch(AssertionError):
    """A run that sampled or read something else than its settings say."""


# The model and its adapters


@functools.cache
def load(directory):
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64), AutoTokenizer.from_pretrained(
        directory
    )


def linears(config):
    """{path: weight} of the layers that may have an adapter, as the run keeps them."""
    return dict(_linears(config.model, config.method == "qlora", config.double_quant))


@functools.cache
def _linears(directory, nf4, double_quant):
    model, _ = load(directory)
    paths = [f"model.layers.{layer}.{name}" for layer in range(model.config.num_hidden_layers) for name in LINEARS]
    weights = {path: model.get_submodule(path).weight.detach() for path in paths}
    if nf4:
        for path, weight in weights.items():
            weights[path] = quantize_nf4(weight.float(), double_quant=double_quant).dequantize().double()
    return weights


def excluded(config, path):
    return not {*path.split(".")}.isdisjoint((config.exclude_modules or "").split(","))


def targets(config, paths):
    paths = [path for path in paths if not excluded(config, path)]
    if config.target in ("all", "all-linear"):
        return paths
    return [path for path in paths if path.rpartition(".")[2] in config.target.split(",")]


def draw_lora(config):
    """lora_a and lora_b of each layer in turn, from torch's generator as it is."""
    state, r = {}, config.init_r if config.method == "adalora" else config.r
    weights = linears(config)
    for path in targets(config, weights):
        rows, columns = weights[path].shape
        a, b = torch.zeros(r, columns), torch.zeros(rows, r)
        if config.method == "adalora":
            a.normal_(std=0.02), b.normal_(std=0.02)
            state[f"{path}.lora_e"] = torch.zeros(r)
        elif config.init == "default":
            bound = 1 / math.sqrt(columns)
            a.uniform_(-bound, bound)
        if config.init in ("gaussian", "both_gaussian"):
            a.normal_(std=1 / r)
        if config.init in ("b_gaussian", "both_gaussian"):
            b.normal_(std=1 / math.sqrt(r))
        state |= {f"{path}.lora_a": a, f"{path}.lora_b": b}
    state = {name: tensor.double() for name, tensor in state.items()}
    if config.method == "dora":
        for path in targets(config, weights):
            update = scaling(config) * state[f"{path}.lora_b"] @ state[f"{path}.lora_a"]
            state[f"{path}.lora_magnitude"] = (weights[path] + update).norm(dim=1)
    return state


def scaling(config):
    if config.r is None:
        return read_adapter(config.adapter)[1]
    if config.method == "adalora":
        return config.lora_alpha / (config.init_r + 1e-5)
    return config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)


def draw(config):
    """The trainable tensors at the start."""
    if config.adapter:
        return read_adapter(config.adapter)[0]
    model, tokenizer = load(config.model)
    torch.manual_seed(config.seed)
    if config.method == "full":
        names = [name for name, _ in model.named_parameters()]
        chosen = names if config.target == "all" else [n for n in names if n.split(".")[-2] in config.target.split(",")]
        chosen = [name for name in chosen if not excluded(config, name)]
        return {name: model.get_parameter(name).detach().clone() for name in chosen}
    if config.method not in ("prefix", "prompt"):
        return draw_lora(config)
    n, embeddings = config.num_virtual_tokens, model.get_input_embeddings().weight.detach()
    ids = None
    if config.init == "vocab":
        ids = torch.randint(len(embeddings), (n,))
    elif config.init == "text":
        ids = torch.tensor((tokenizer(config.init_text, add_special_tokens=False).input_ids * n)[:n])
    if config.method == "prompt":
        start = embeddings[ids] if ids is not None else torch.randn(n, embeddings.shape[1]) * embeddings.std()
        return {"virtual_tokens.embeddings": start.double()}
    start = torch.cat(
        [torch.stack(pair).flatten(0, 1) for pair in key_values(model, ids if ids is not None else [0] * n)]
    )
    start = start.permute(1, 0, 2).flatten(1)
    if config.init == "random":
        start = 0.02 * torch.randn(start.shape).double()
    elif config.init == "zero":
        start = torch.zeros_like(start)
    if config.mlp_hidden is None:
        return {"virtual_tokens.key_values": start}
    width = model.config.num_key_value_heads * model.config.hidden_size // model.config.num_attention_heads
    embeddings = torch.randn(n, width)
    torch.nn.Linear(config.mlp_hidden, start.shape[1])
    first = torch.nn.Linear(width, config.mlp_hidden)
    mlp = {"0.weight": first.weight, "0.bias": first.bias}
    mlp |= {"2.weight": torch.zeros(start.shape[1], config.mlp_hidden), "2.bias": torch.zeros(start.shape[1])}
    state = {"embeddings": embeddings, **{f"mlp.{name}": tensor.detach() for name, tensor in mlp.items()}}
    return {f"virtual_tokens.{name}": tensor.double() for name, tensor in state.items()} | {"(start)": start}


@torch.no_grad()
def key_values(model, ids):
    """(keys, values), each [heads, n, head_dim], of the layers."""
    cache = DynamicCache()
    model(torch.as_tensor(ids)[None], **{cache_argument(model.forward): cache, "use_cache": True})
    return [(layer.keys[0], layer.values[0]) for layer in cache.layers]


def forward(config, state, rows, scale=None):
    """(logits, hidden) [B, T, ...] of rows of token ids, padded on the right, where nothing looks at the pads."""
    model, _ = load(config.model)
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    for row, tokens in enumerate(rows):
        ids[row, : len(tokens)] = torch.tensor(tokens)
    # Layers without an adapter may be in NF4, too.
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    weights |= {f"{path}.weight": weight for path, weight in linears(config).items()}
    weights |= {name: tensor for name, tensor in state.items() if name in weights}
    for path in [name.removesuffix(".lora_a") for name in state if name.endswith(".lora_a")]:
        a, b, e, magnitude = (state.get(f"{path}.lora_{name}") for name in ("a", "b", "e", "magnitude"))
        weight = weights[f"{path}.weight"] + (scale or scaling(config)) * (b if e is None else b * e) @ a
        if magnitude is not None:
            weight = (magnitude / weight.norm(dim=1).detach())[:, None] * weight
        weights[f"{path}.weight"] = weight
    x, states, n = weights["model.embed_tokens.weight"][ids], None, 0
    if "virtual_tokens.embeddings" in state and config.method == "prompt":
        prompt = state["virtual_tokens.embeddings"]
        n, x = len(prompt), torch.cat([prompt.expand(len(rows), -1, -1), x], 1)
    elif config.method == "prefix" and state:
        shape = (2 * model.config.num_hidden_layers, model.config.num_key_value_heads, -1)
        states = prefix(state).unflatten(1, shape).permute(1, 2, 0, 3)
    hidden = decode(model.config, weights, x, states)[:, n:]
    return hidden @ weights["lm_head.weight"].T, hidden


def decode(config, weights, x, states=None):
    """Llama (Touvron et al. 2023) from embeddings [B, T, d]; states [2 layers, heads, n, head_dim]: the keys and values
    of a prefix."""
    (batch, length, width), heads = x.shape, config.num_attention_heads
    before = 0 if states is None else states.shape[2]
    size = width // heads
    angles = torch.arange(before, before + length)[:, None] * 10000.0 ** (-2 * torch.arange(size // 2) / size)
    cos, sin = (f(angles.double()).repeat(1, 2) for f in (torch.cos, torch.sin))
    future = torch.ones(length, before + length).triu(before + 1).bool()

    def norm(x, name):
        return weights[f"{name}.weight"] * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + config.rms_norm_eps)

    def rotate(x):
        return x * cos + torch.cat([-x[..., size // 2 :], x[..., : size // 2]], -1) * sin

    for layer in range(config.num_hidden_layers):

        def linear(x, name, path=f"model.layers.{layer}"):
            return x @ weights[f"{path}.{name}.weight"].T

        h = norm(x, f"model.layers.{layer}.input_layernorm")
        q, k, v = (linear(h, f"self_attn.{name}_proj").view(batch, length, -1, size).transpose(1, 2) for name in "qkv")
        q, k = rotate(q), rotate(k)
        if states is not None:
            given = states[2 * layer : 2 * layer + 2].expand(batch, -1, -1, -1, -1).transpose(0, 1)
            k, v = (torch.cat(pair, 2) for pair in zip(given, (k, v), strict=True))
        k, v = (y.repeat_interleave(heads // y.shape[1], 1) for y in (k, v))
        attention = (q @ k.mT / math.sqrt(size)).masked_fill(future, -math.inf).softmax(-1)
        x = x + linear((attention @ v).transpose(1, 2).flatten(2), "self_attn.o_proj")
        h = norm(x, f"model.layers.{layer}.post_attention_layernorm")
        gate = linear(h, "mlp.gate_proj")
        x = x + linear(gate * gate.sigmoid() * linear(h, "mlp.up_proj"), "mlp.down_proj")
    return norm(x, "model.norm")


def prefix(state):
    if "virtual_tokens.key_values" in state:
        return state["virtual_tokens.key_values"]
    part = {name.removeprefix("virtual_tokens."): tensor for name, tensor in state.items()}
    hidden = torch.tanh(part["embeddings"] @ part["mlp.0.weight"].T + part["mlp.0.bias"])
    return state["(start)"] + hidden @ part["mlp.2.weight"].T + part["mlp.2.bias"]


# The data


def order(rows, seed, count):
    """Indices of the first `count` rows: each epoch's permutation after the other."""
    epochs = [np.random.default_rng([seed, epoch]).permutation(rows) for epoch in range(-(-count // rows))]
    return np.concatenate(epochs)[:count].tolist()


def jinja(template):
    """The chat template that renders each message as `template` does."""
    turn = template.replace("{role}", "{{ message['role'] }}").replace("{content}", "{{ message['content'] }}")
    ask = template.split("{content}")[0].format(role="assistant")
    return f"{{% for message in messages %}}{turn}{{% endfor %}}{{% if add_generation_prompt %}}{ask}{{% endif %}}"


DATED = "{{ strftime_now('%d%m%y') }}\n" + jinja(PLAIN)


def ask(config, prompt):
    """The text up to where the answer starts, and what ends it."""
    template = PLAIN if config.chat_template else CHATML
    before, end = template.split("{content}")
    date = datetime.date.fromisoformat(config.date).strftime("%d%m%y\n") if config.chat_template == DATED else ""
    return date + template.format(role="user", content=prompt) + before.format(role="assistant"), end.rstrip("\n")


def encode(tokenizer, text):
    return tokenizer(text, add_special_tokens=False).input_ids


def render(config, prompt, answer):
    """(ids, which of them are learned) of a question and its answer."""
    text, end = ask(config, prompt)
    tokenizer = load(config.model)[1]
    ids, learned = encode(tokenizer, text), encode(tokenizer, answer + end)
    return ids + learned, [False] * len(ids) + [True] * len(learned)


def read(path):
    return json.loads(Path(path).read_text())


# The optimizer


class AdamW:
    """Loshchilov and Hutter 2019, algorithm 2, after clipping by the norm of all gradients together."""

    def __init__(self, config):
        self.config, self.steps, self.moments = config, 0, {}

    def step(self, state, grads, rates):
        """New values in `state`; returns the norm before clipping, and the clipped gradients."""
        norm = math.sqrt(sum(float(grad.square().sum()) for grad in grads.values()))
        limit = self.config.max_grad_norm or math.inf
        factor = min(1.0, limit / (norm + 1e-6))
        grads = {name: grad * factor for name, grad in grads.items()}
        self.steps += 1
        for name, grad in grads.items():
            m, v = self.moments.get(name, (0.0, 0.0))
            m, v = self.moments[name] = 0.9 * m + 0.1 * grad, 0.999 * v + 0.001 * grad.square()
            step = (m / (1 - 0.9**self.steps)) / ((v / (1 - 0.999**self.steps)).sqrt() + 1e-8)
            decay = self.config.weight_decay if grad.ndim >= 2 else 0.0
            state[name] = state[name] - rates[name] * (step + decay * state[name])
        return norm, grads


def rates(config, names, lr):
    ratio = config.lr_ratio if config.optimizer == "loraplus" else 1.0
    return {name: lr * (ratio if name.endswith("lora_b") else 1.0) for name in names}


def lr_factor(config, step, total):
    """Of step `step` from 0: a linear warm-up whose last step is at the peak, then the schedule over the rest."""
    warmup = math.ceil(config.warmup_ratio * total)
    if step < warmup:
        return (step + 1) / warmup
    t = (step - warmup) / (total - warmup)
    return {"cosine": 0.5 + 0.5 * math.cos(math.pi * t), "linear": 1 - t, "constant": 1.0}[config.lr_scheduler]


def steps_of(config, rows, per_step):
    """(steps, rows that they take in all)."""
    count = config.max_steps * per_step if config.max_steps else math.ceil(config.epochs * rows)
    return -(-count // per_step), count


def due(step, every, total):
    return step % every == 0 or step == total


# SFT, reward, DPO


class SFT:
    def __init__(self, config):
        self.config = config

    def rows(self, path):
        found = []
        for record in read(path):
            ids, mask = render(self.config, record["instruction"], record["output"])
            ids, mask = ids[: self.config.max_length], mask[: self.config.max_length]
            if any(mask):
                found.append((ids, mask))
        return found

    def start(self):
        return draw(self.config)

    def size(self, row):
        """(tokens, what the row adds to the divisor)."""
        return len(row[0]), sum(row[1])

    def sums(self, state, rows):
        return {"loss": -self.logprobs(state, rows).sum()}

    def logprobs(self, state, rows):
        """Summed over the learned tokens of each row."""
        logits, _ = forward(self.config, state, [ids for ids, _ in rows])
        found = []
        for row, (ids, mask) in enumerate(rows):
            logprobs = logits[row, : len(ids) - 1].log_softmax(-1)
            found.append(logprobs.gather(1, torch.tensor(ids[1:])[:, None])[:, 0][torch.tensor(mask[1:])].sum())
        return torch.stack(found)


def pair_sums(losses, chosen, rejected):
    # A margin that is 0 but for rounding may have either sign.
    near = bool(((chosen - rejected).abs() < 1e-5).any())
    return {
        "loss": losses.sum(),
        "accuracy": torch.tensor(math.nan) if near else (chosen > rejected).double().sum(),
        "margin": (chosen - rejected).sum(),
        "reward_chosen": chosen.sum(),
        "reward_rejected": rejected.sum(),
    }


class Pairs(SFT):
    def rows(self, path):
        found = []
        for record in read(path):
            pair = [render(self.config, record["prompt"], record[name]) for name in ("chosen", "rejected")]
            if max(len(ids) for ids, _ in pair) <= self.config.max_length:
                found.append((*pair, record.get("margin", 0.0)))
        return found

    def size(self, row):
        return len(row[0][0]) + len(row[1][0]), 1

    def both(self, compute, rows):
        return compute([row[0] for row in rows]), compute([row[1] for row in rows])


class Reward(Pairs):
    def start(self):
        hidden = load(self.config.model)[0].config.hidden_size
        head = torch.empty(1, hidden).normal_(
            std=1 / math.sqrt(hidden + 1), generator=torch.Generator().manual_seed(self.config.seed)
        )
        return draw(self.config) | {"score.weight": head.double()}

    def sums(self, state, rows):
        def rewards(answers):
            _, hidden = forward(self.config, state, [ids for ids, _ in answers])
            return torch.stack([state["score.weight"][0] @ hidden[row, len(a[0]) - 1] for row, a in enumerate(answers)])

        chosen, rejected = self.both(rewards, rows)
        margins = torch.tensor([row[2] for row in rows], dtype=torch.float64)
        losses = torch.log1p(torch.exp(-(chosen - rejected - margins)))
        return pair_sums(losses + self.config.center_coef * (chosen + rejected) ** 2, chosen, rejected)


class DPO(Pairs):
    def start(self):
        return draw(self.config)

    def sums(self, state, rows):
        reference = DPO.start(self) if self.config.method == "full" or self.config.adapter else {}
        with torch.no_grad():
            before = self.both(lambda answers: self.logprobs(reference, answers), rows)
        now = self.both(lambda answers: self.logprobs(state, answers), rows)
        chosen, rejected = (ours - theirs for ours, theirs in zip(now, before, strict=True))
        beta, smoothing = self.config.beta, self.config.label_smoothing
        if self.config.loss == "ipo":
            lengths = self.both(lambda answers: torch.tensor([sum(mask) for _, mask in answers]), rows)
            losses = (chosen / lengths[0] - rejected / lengths[1] - 1 / (2 * beta)) ** 2
        else:
            z = beta * (chosen - rejected)
            losses = (1 - smoothing) * torch.log1p(torch.exp(-z)) + smoothing * torch.log1p(torch.exp(z))
        return pair_sums(losses, beta * chosen, beta * rejected)


class Ranks:
    """Zhang et al. 2023, algorithm 1, with the schedule of section 3.3 and the scores of 3.2."""

    def __init__(self, config, state, total):
        self.config, self.last = config, total - config.tfinal
        self.paths = [name.removesuffix(".lora_e") for name in state if name.endswith(".lora_e")]
        self.first, self.final = config.init_r * len(self.paths), config.target_r * len(self.paths)
        self.importance, self.uncertainty, self.kept = {}, {}, self.first

    def budget(self, step):
        if step <= self.config.tinit:
            return self.first
        left = 1 - (step - self.config.tinit) / (self.last - self.config.tinit)
        return int(self.final + (self.first - self.final) * max(left, 0.0) ** 3)

    def after(self, step, state, grads, optimizer):
        if step > self.last:
            return
        if step < self.last:
            for name, grad in grads.items():
                sensitivity = (state[name] * grad).abs()
                mean = self.importance.get(name, torch.zeros_like(grad))
                mean = self.importance[name] = self.config.beta1 * mean + (1 - self.config.beta1) * sensitivity
                spread = self.uncertainty.get(name, torch.zeros_like(grad))
                spread = self.config.beta2 * spread + (1 - self.config.beta2) * (sensitivity - mean).abs()
                self.uncertainty[name] = spread
        if step < self.last and (step <= self.config.tinit or step % self.config.delta_t):
            return
        score = {name: self.importance[name] * self.uncertainty[name] for name in self.importance}
        scores = {
            (path, i): float(score[f"{path}.lora_e"][i] + score[f"{path}.lora_a"][i].mean())
            + float(score[f"{path}.lora_b"][:, i].mean())
            for path in self.paths
            for i in range(self.config.init_r)
        }
        best = set(sorted(scores, key=scores.get, reverse=True)[: self.budget(step)])
        self.kept = len(best)
        for path in self.paths:
            keep = torch.tensor([(path, i) in best for i in range(self.config.init_r)])
            state[f"{path}.lora_e"] = state[f"{path}.lora_e"] * keep
            if step == self.last:
                for name, at in (("a", keep), ("b", (slice(None), keep)), ("e", keep)):
                    key = f"{path}.lora_{name}"
                    state[key] = state[key][at]
                    optimizer.moments[key] = tuple(moment[at] for moment in optimizer.moments[key])

    def orthogonality(self, state):
        norms = []
        for path in self.paths:
            for matrix in (state[f"{path}.lora_a"], state[f"{path}.lora_b"].T):
                if len(matrix):
                    norms.append((matrix @ matrix.T - torch.eye(len(matrix))).norm())
        return self.config.orth_reg_weight * torch.stack(norms).mean()


def expected(trainer, config):
    """(records of metrics.jsonl, {name: value} of the last checkpoint, that of the adapter in output_dir)."""
    task = {"sft": SFT, "reward": Reward, "dpo": DPO}[trainer](config)
    rows, judged = task.rows(config.data), task.rows(config.eval_data) if config.eval_data else None
    per_step = config.batch_size * config.gradient_accumulation_steps
    total, count = steps_of(config, len(rows), per_step)
    taken = [rows[index] for index in order(len(rows), config.seed, count)]
    epoch = max(1, round(len(rows) / per_step))
    state, optimizer, records, window, tokens = task.start(), AdamW(config), [], Counter(), 0
    ranks = Ranks(config, state, total) if config.method == "adalora" else None
    best = (math.inf, None)
    for step in range(total):
        chosen = taken[step * per_step : (step + 1) * per_step]
        sizes = [task.size(row) for row in chosen]
        divisor = sum(size for _, size in sizes)
        trained = {name: x.requires_grad_() for name, x in state.items() if name != "(start)" and x.numel()}
        sums = task.sums(state, chosen)
        loss = sums["loss"] / divisor
        extra = ranks.orthogonality(state) if ranks else torch.zeros(())
        grads = dict(zip(trained, torch.autograd.grad(loss + extra, trained.values()), strict=True))
        state = {name: x.detach() for name, x in state.items()}
        factor = lr_factor(config, step, total)
        norm, clipped = optimizer.step(state, grads, rates(config, grads, config.lr * factor))
        step += 1
        if ranks:
            ranks.after(step, state, clipped, optimizer)
        tokens += sum(length for length, _ in sizes)
        for name, value in sums.items():
            window[name] += value.item()
        window["count"] += divisor
        at = {"step": step, "epoch": round(min(step * per_step, count) / len(rows), 4)}
        if due(step, config.logging_steps, total):
            means = {name: value / window["count"] for name, value in window.items() if name != "count"}
            record = {**at, **means, "lr": config.lr * factor, "grad_norm": norm, "tokens": tokens}
            if ranks:
                average = round(ranks.kept / len(ranks.paths), 4)
                record |= {"extra_loss": extra.item(), "budget": ranks.budget(step), "average_rank": average}
            records.append(record)
            window.clear()
        if judged and due(step, config.eval_steps or epoch, total):
            with torch.no_grad():
                means = task.sums(state, judged)
            divisor = sum(task.size(row)[1] for row in judged)
            means = {f"eval_{name}": float(value) / divisor for name, value in means.items()}
            records.append({**at, **means})
            best = min(best, (records[-1]["eval_loss"], state), key=lambda pair: pair[0])
    return records, *(
        {name: x for name, x in s.items() if name != "(start)" and x.numel()} for s in (state, best[1] or state)
    )


# PPO


def read_adapter(directory):
    """(tensors by our names, scaling, {module: tensor} that was trained in full) of a PEFT LoRA adapter's files."""
    config = read(Path(directory) / "adapter_config.json")
    state, saved = {}, {}
    for name, tensor in load_file(Path(directory) / "adapter_model.safetensors").items():
        name = name.removeprefix("base_model.model.")
        if ".lora_" in name:
            state[name.replace(".lora_A.weight", ".lora_a").replace(".lora_B.weight", ".lora_b")] = tensor.double()
        else:
            saved[name] = tensor.double()
    return state, config["lora_alpha"] / config["r"], saved


class Role:
    """A set of adapters and the head, over the base model."""

    def __init__(self, config, state, scale, head=None):
        self.config, self.scale = config, scale
        self.state = state if head is None else {**state, "score.weight": head}

    def track(self):
        self.state = {name: tensor.detach().requires_grad_() for name, tensor in self.state.items()}
        return self.state

    def logprobs(self, episodes):
        """One tensor of each answer's tokens, and their entropies, at the temperature of the sampling."""
        logits, _ = forward(self.config, self.state, [e.prompt + e.response for e in episodes], self.scale)
        found, entropies = [], []
        for row, e in enumerate(episodes):
            start = len(e.prompt) - 1
            logprobs = (logits[row, start : start + len(e.response)] / self.config.temperature).log_softmax(-1)
            found.append(logprobs.gather(1, torch.tensor(e.response)[:, None])[:, 0])
            entropies.append(-(logprobs.exp() * logprobs).sum(1))
        return found, entropies

    def values(self, episodes):
        """Of the state before each token and of that after the last."""
        _, hidden = forward(self.config, self.state, [e.prompt + e.response for e in episodes], self.scale)
        return [
            hidden[row, len(e.prompt) - 1 : len(e.prompt) + len(e.response)] @ self.state["score.weight"][0]
            for row, e in enumerate(episodes)
        ]


def roles(config):
    """policy, reference, value, reward (None without an adapter) at the start."""
    torch.manual_seed(config.seed)
    policy = read_adapter(config.adapter)[:2] if config.adapter else (draw_lora(config), scaling(config))
    reference = policy if config.adapter else ({}, 1.0)
    reward = None
    if config.reward_adapter:
        state, scale, saved = read_adapter(config.reward_adapter)
        reward = Role(config, state, scale, saved["score.weight"])
        value = Role(config, dict(state), scale, saved["score.weight"])
    else:
        hidden = load(config.model)[0].config.hidden_size
        value = Role(config, draw_lora(config), scaling(config), torch.zeros(1, hidden, dtype=torch.float64))
    return Role(config, *policy), Role(config, *reference), value, reward


def whiten(rows, keep_mean):
    """Over all numbers of all rows: mean 0 (or as it was) and the unbiased variance 1, which takes two."""
    flat = np.concatenate(rows)
    if len(flat) < 2:
        return rows
    mean, deviation = flat.mean(), math.sqrt(flat.var(ddof=1) + 1e-8)
    return [(row - mean) / deviation + (mean if keep_mean else 0.0) for row in rows]


def advantages_and_returns(config, rewards, values):
    """Schulman et al. 2016, equation 16: the sum over the future that defines the estimator, of one answer."""
    n = len(rewards)
    ahead = np.append(values[1:n], 0.0)
    delta = rewards + config.gamma * ahead - values[:n]
    discount = config.gamma * config.lam
    advantages = np.array([sum(discount ** (k - t) * delta[k] for k in range(t, n)) for t in range(n)])
    return advantages, advantages + values[:n]


@dataclasses.dataclass
class Answer:
    """An episode, and what is learned from it: of each token, or each of its states."""

    episode: object
    logprobs: torch.Tensor
    values: np.ndarray
    returns: np.ndarray
    advantages: np.ndarray


class PPO:
    def __init__(self, config, score, stops, drawn, evaluations):
        """score(text); stops: token ids; drawn, evaluations: the episodes of each step and evaluation, by prompt."""
        self.config, self.score_text, self.stops = config, score, stops
        self.drawn, self.evaluations = list(drawn), list(evaluations)
        self.tokenizer = load(config.model)[1]
        self.policy, self.reference, self.value, self.reward = roles(config)
        self.optimizer, self.kl_coef = AdamW(config), config.kl_coef
        self.episodes = self.skipped = self.tokens = 0
        self.records = []

    def prompts(self, path):
        limit = self.config.max_length - self.config.max_new_tokens
        rows = [encode(self.tokenizer, ask(self.config, record["instruction"])[0]) for record in read(path)]
        return [ids for ids in rows if len(ids) <= limit]

    def answers(self, prompts, drawn):
        """The episodes of these prompts; Mismatch where they aren't what the settings allow."""
        by_prompt = defaultdict(list)
        for e in drawn:
            by_prompt[tuple(e.prompt)].append(e)
        if Counter(map(tuple, prompts)) != {prompt: len(found) for prompt, found in by_prompt.items()}:
            raise Mismatch("other prompts")
        for e in drawn:
            stopped = [token in self.stops for token in e.response]
            full = len(e.response) == self.config.max_new_tokens
            if any(stopped[:-1]) or len(e.response) > self.config.max_new_tokens or not (stopped[-1] or full):
                raise Mismatch(f"an answer of {len(e.response)} tokens with stops {stopped}")
            if e.ended != stopped[-1]:
                raise Mismatch("ended")
        return [by_prompt[tuple(prompt)].pop(0) for prompt in prompts]

    def text(self, e):
        return self.tokenizer.decode([t for t in e.response if t not in self.stops], skip_special_tokens=True)

    def scores(self, episodes):
        if self.reward is None:
            return [self.score_text(self.text(e)) for e in episodes]
        normalization = Path(self.config.reward_adapter) / "reward_normalization.json"
        gain, bias = (read(normalization)[name] for name in ("gain", "bias"))
        with torch.no_grad():
            return [gain * float(values[-1]) + bias for values in self.reward.values(episodes)]

    def run(self):
        """(records, {name: value} of policy and value model)."""
        config = self.config
        rows = self.prompts(config.data)
        shown = (self.prompts(config.eval_data) if config.eval_data else rows)[: config.eval_prompts]
        total, count = steps_of(config, len(rows), config.rollout_size)
        taken = order(len(rows), config.seed, count)
        epoch = max(1, round(len(rows) / config.rollout_size))
        self.evaluate(shown, 0)
        for step in range(total):
            prompts = [rows[i] for i in taken[step * config.rollout_size : (step + 1) * config.rollout_size]]
            if not self.drawn:
                raise Mismatch("a rollout is missing")
            self.step(prompts, self.drawn.pop(0), step, total)
            if due(step + 1, config.eval_steps or epoch, total):
                self.evaluate(shown, step + 1)
        if self.drawn or self.evaluations:
            raise Mismatch("more rollouts than steps")
        value = {name: tensor for name, tensor in self.value.state.items() if name != "score.weight"}
        paths = list(dict.fromkeys(name.rpartition(".")[0] for name in value))
        paths = [path for path in linears(config) if path in paths]
        parts = {f"parked_adapters.value.parts.{paths.index(n.rpartition('.')[0])}.{n.rpartition('.')[2]}": t
                 for n, t in value.items()}  # fmt: skip
        parts[f"parked_adapters.value.parts.{len(paths)}.weight"] = self.value.state["score.weight"]
        return self.records, {**self.policy.state, **parts}

    def evaluate(self, shown, step):
        if not shown:
            return
        if not self.evaluations:
            raise Mismatch("an evaluation is missing")
        episodes = self.answers(shown, self.evaluations.pop(0))
        scores = [score for score in self.scores(episodes) if math.isfinite(score)]
        self.records.append({
            "step": step, "eval_score": np.mean(scores), "eval_score_std": np.std(scores),
            "eval_response_length": np.mean([len(e.response) for e in episodes]),
            "eval_ended": np.mean([e.ended for e in episodes]),
        })  # fmt: skip

    def step(self, prompts, drawn, step, total):
        config = self.config
        everyone = self.answers(prompts, drawn)
        scored = [(e, s) for e, s in zip(everyone, self.scores(everyone), strict=True) if math.isfinite(s)]
        if config.bad_rewards == "error" and len(scored) < len(everyone):
            raise Mismatch("a bad reward")
        episodes, scores = [e for e, _ in scored], np.array([s for _, s in scored])
        with torch.no_grad():
            (old, entropies), (reference, _) = self.policy.logprobs(episodes), self.reference.logprobs(episodes)
            values = [v.numpy() for v in self.value.values(episodes)]
        d = [(r - o).numpy() for r, o in zip(reference, old, strict=True)]
        kl = [{"k1": -x, "k2": x**2 / 2, "k3": np.exp(x) - 1 - x}[config.kl_estimator] for x in d]
        ended = np.array([e.ended for e in episodes])
        penalised = scores - config.missing_eos_penalty * (1 - ended)
        rewards = []
        for tokens, score in zip(kl, penalised, strict=True):
            # "after" gives the score to the state after the last token, if there is room for one.
            room = config.score_position == "after" and len(tokens) < config.max_new_tokens
            reward = np.append(-self.kl_coef * tokens, [0.0] * room)
            reward[-1] += score
            rewards.append(reward)
        if config.whiten_rewards:
            rewards = whiten(rewards, keep_mean=True)
        pairs = [advantages_and_returns(config, r, v) for r, v in zip(rewards, values, strict=True)]
        old_values = [v[: len(r)] for r, v in zip(rewards, values, strict=True)]
        returns = [r for _, r in pairs]
        advantages = [a[: len(e.response)] for (a, _), e in zip(pairs, episodes, strict=True)]
        if config.whiten_advantages:
            advantages = whiten(advantages, keep_mean=False)

        factor = lr_factor(config, step, total)
        answers = [Answer(*parts) for parts in zip(episodes, old, old_values, returns, advantages, strict=True)]
        learned = self.learn(answers, step + 1, factor)
        self.episodes += len(episodes)
        self.skipped += len(everyone) - len(episodes)
        self.tokens += sum(len(e.prompt) + len(e.response) for e in everyone)
        sums = np.array([x.sum() for x in kl])
        flat_returns, flat_values = np.concatenate(returns), np.concatenate(old_values)
        self.records.append({
            "step": step + 1,
            "episode": self.episodes,
            "objective/kl": sums.mean(),
            "objective/kl_per_token": np.concatenate(kl).mean(),
            "objective/entropy": torch.cat(entropies).mean().item(),
            "objective/scores": scores.mean(),
            "objective/scores_std": scores.std(),
            "objective/non_score_reward": -self.kl_coef * sums.mean(),
            "objective/rlhf_reward": penalised.mean() - self.kl_coef * sums.mean(),
            "val/explained_variance": 1 - (flat_returns - flat_values).var() / max(flat_returns.var(), 1e-12),
            "val/num_eos_tokens": ended.sum(),
            "val/response_length": np.mean([len(e.response) for e in episodes]),
            "objective/kl_coef": self.kl_coef,
            **learned,
            "val/empty_responses": sum(not self.text(e).strip() for e in everyone),
            "skipped": self.skipped,
            "lr": config.lr * factor,
            "tokens": self.tokens,
        })  # fmt: skip
        if config.kl_target is not None:
            error = min(max(sums.mean() / config.kl_target - 1, -0.2), 0.2)
            self.kl_coef *= 1 + error * len(episodes) / config.kl_horizon

    def learn(self, answers, step, factor):
        done, stopped = [], False
        random = np.random.default_rng([self.config.seed, step])
        for epoch in range(self.config.ppo_epochs):
            rows = range(len(answers)) if epoch == 0 else random.permutation(len(answers))
            for minibatch in np.array_split(np.array(rows), self.config.minibatches):
                if len(minibatch) and not stopped:
                    metrics, stopped = self.minibatch([answers[index] for index in minibatch], factor)
                    done.append(metrics)
        means = {name: np.mean([metrics[name] for metrics in done]) for name in done[0]}
        return {**means, "policy/first_approxkl": done[0]["policy/approxkl"], "policy/minibatches": len(done),
                "policy/stopped_early": int(stopped)}  # fmt: skip

    def minibatch(self, answers, factor):
        """Schulman et al. 2017, equation 7; Ye et al. 2020, equation 5; the value loss as in OpenAI's code."""
        config, episodes = self.config, [answer.episode for answer in answers]
        roles = {"policy": self.policy, "value": self.value}
        trained = {(who, name): x for who, role in roles.items() for name, x in role.track().items()}
        log_ratio = torch.cat(self.policy.logprobs(episodes)[0]) - torch.cat([answer.logprobs for answer in answers])
        ratio, a = log_ratio.exp(), torch.tensor(np.concatenate([answer.advantages for answer in answers]))
        plain, clipped = -a * ratio, -a * ratio.clamp(1 - config.cliprange, 1 + config.cliprange)
        losses = torch.maximum(plain, clipped)
        if config.dual_clip is not None:
            losses = torch.where(a < 0, torch.minimum(losses, -a * config.dual_clip), losses)
        old, target = (
            torch.tensor(np.concatenate([getattr(answer, name) for answer in answers]))
            for name in ("values", "returns")
        )
        states = zip(answers, self.value.values(episodes), strict=True)
        value = torch.cat([values[: len(answer.returns)] for answer, values in states])
        near = value.clamp(old - config.cliprange_value, old + config.cliprange_value)
        errors, near_errors = (value - target) ** 2, (near - target) ** 2
        policy_loss, value_loss = losses.mean(), torch.maximum(errors, near_errors).mean() / 2
        loss = policy_loss + config.vf_coef * value_loss
        metrics = {
            "loss/policy": policy_loss, "loss/value": value_loss, "loss": loss,
            "policy/approxkl": (log_ratio**2 / 2).mean(), "policy/clipfrac": (clipped > plain).double().mean(),
            "val/clipfrac": (near_errors > errors).double().mean(), "val/ratio": ratio.mean(),
            "val/ratio_var": (ratio**2).mean() - ratio.mean() ** 2,
        }  # fmt: skip
        metrics = {name: x.item() for name, x in metrics.items()} | {"grad_norm": 0.0}
        stop = config.target_kl is not None and metrics["policy/approxkl"] > config.target_kl
        if not stop:
            grads = dict(zip(trained, torch.autograd.grad(loss, trained.values()), strict=True))
            state = {key: x.detach() for key, x in trained.items()}
            peaks = {"policy": config.lr, "value": config.value_lr or config.lr}
            speeds = {key: rates(config, [key[1]], peaks[key[0]] * factor)[key[1]] for key in trained}
            metrics["grad_norm"], _ = self.optimizer.step(state, grads, speeds)
            for (who, name), x in state.items():
                roles[who].state[name] = x
        return metrics, stop
