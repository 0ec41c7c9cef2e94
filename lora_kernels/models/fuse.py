"""The parts of a transformers decoder around its linear layers: fewer passes over memory, and less of it kept."""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable
from functools import wraps
from types import CellType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from lora_kernels import backends, reference
from lora_kernels.backends import cpu
from lora_kernels.nn.lora_linear import AdaptedLayer, is_linear, open_group
from lora_kernels.nn.wrappers import Model, unwrapped
from lora_kernels.ops.attention import MAX_HEAD_DIM, causal_attention
from lora_kernels.ops.cpu_only import is_fused
from lora_kernels.ops.frozen_linear import frozen_linear
from lora_kernels.ops.recompute import recomputing
from lora_kernels.ops.rms_norm import rms_norm
from lora_kernels.ops.rotary import rotary, takes_rotary
from lora_kernels.ops.swiglu import swiglu

# Linear layers of one module that read the same x.
_SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
# The function by which transformers' attentions rotate queries and keys; it is called with the arguments after it.
_ROTARY, _ROTARY_ARGUMENTS = "apply_rotary_pos_emb", ("q", "k", "cos", "sin")
_MLP = ("gate_proj", "up_proj", "down_proj", "act_fn")
# Features of the layers on which an MLP is tried.
_SMALL = 8
# Where attention was measured (avx2), or is made of the same tiles; and from how many rows, and tokens in all, it was
# faster than torch's.
_ATTENTION_ISAS = ("avx2", "avx512", "avx512_bf16", "avx512_amx")
_MIN_ROWS, _MIN_TOKENS = 16, 64
# Up to so many rows also where torch multiplies bfloat16 in hardware.
_MAX_NATIVE_ROWS = 1024
# The attribute of a module whose forward is ours; whatever else `fuse_decoder` notes there begins alike.
_MARK, _PREFIX = "lora_kernels_forward", "lora_kernels_"
# What models pass to their attention functions and transformers' "sdpa" doesn't look at.
_IGNORED = {"cache_position", "num_items_in_batch", "output_hidden_states", "position_ids", "return_dict",
            "sliding_window", "use_cache"}  # fmt: skip


def fuse_decoder(model: nn.Module) -> int:
    """Compute the RMSNorms, SwiGLUs and rotary position embeddings of a Llama-like transformers model by
    `lora_kernels.ops`, its causal attention by `lora_kernels.ops.attention`, adapted layers that read the same
    x (query, key and value; gate and up) by one `lora_linear_group`, with one dropout, and the output embeddings by
    `frozen_linear`.

    An RMSNorm is a module named so, with `weight` [K] alone, whose own result on a probe is that of the formula, with
    Gemma's offset or without; a SwiGLU is a module of gate_proj, up_proj, down_proj and a SiLU act_fn, whose result is
    bit for bit the composition of these; rotary position embedding is what a module's `forward` calls by the name of
    apply_rotary_pos_emb, if its result on a probe is that of the formula; layers of one input go by their names, and
    are computed apart again if they turn out to read two. Their `forward` is replaced, on the instance, and nothing
    else: parameters, state dict and types stay. Whatever isn't recognised is left alone. Call it before adapters are
    injected; twice does no harm. In training, results that autograd would keep for the projections are computed again
    in backward.

    Tensors that the kernels don't take (see `ops.cpu_only.is_fused`) go to the module's own forward.

    Attention is transformers' "sdpa" where the config says so; in these modules that calls `causal_attention` for whole
    rows without padding, and torch for everything else. To that end it is registered anew with transformers, once, and
    does for other models what it did. The config stays as it is.

    Returns how many modules it has changed.
    """
    model = unwrapped(model)
    own: list[Any] = [module for module in model.modules() if _has_own_forward(module)]
    count = 0
    for module in own:
        plain = getattr(type(module), "forward", None)
        if not isinstance(plain, FunctionType):
            continue
        if (offset := _norm_offset(module)) is not None:
            module.lora_kernels_offset = offset
            _set_forward(module, _norm_forward)
        else:
            forward = _mlp_forward if _is_swiglu(module) else _rotating(plain)
            names = _projections(module)
            if names:
                module.lora_kernels_apart = False
                if names == _SAME_INPUT[0]:
                    module.lora_kernels_attention = True
                    _register_attention()
                forward = _grouped(forward, names)
            if forward is plain:
                continue
            _set_forward(module, forward)
        count += 1
    head: Any = getattr(model, "get_output_embeddings", lambda: None)()
    if type(head) is nn.Linear and _has_own_forward(head):
        _set_forward(head, _head_forward)
        count += 1
    if count:
        for stack in filter(_is_stack, own):
            _set_forward(stack, _recomputing(type(stack).forward))
    return count


def unfuse_decoder(model: nn.Module) -> None:
    """Undoes `fuse_decoder`: every module has the forward of its class again."""
    for module in model.modules():
        own = vars(module)
        if own.get(_MARK):
            for name in ["forward", *(name for name in own if name.startswith(_PREFIX))]:
                del own[name]


def _set_forward(module: nn.Module, forward: Callable[..., Any]) -> None:
    module.forward = MethodType(forward, module)
    module.__dict__[_MARK] = True


def _has_own_forward(module: nn.Module) -> bool:
    """Whether nobody has replaced it. (What was pickled comes back as the class's.)"""
    forward = vars(module).get("forward")
    return forward is None or getattr(forward, "__func__", None) is type(module).forward


def _norm_eps(norm: nn.Module) -> Any:
    return getattr(norm, "variance_epsilon", getattr(norm, "eps", None))


@torch.no_grad()
def _norm_offset(module: Model) -> float | None:
    """0 or 1 where the module is RMSNorm with that offset, else None."""
    if not type(module).__name__.endswith("RMSNorm") or [name for name, _ in module.named_parameters()] != ["weight"]:
        return None
    weight, eps = module.weight, _norm_eps(module)
    if weight.dim() != 1 or weight.device.type != "cpu" or not isinstance(eps, float):
        return None
    x = _probe(weight.shape[0], weight.dtype)
    found = module(x)
    tolerance = 4 * torch.finfo(weight.dtype).eps
    for offset in (0.0, 1.0):
        expected = reference.rms_norm(x.double(), weight.double(), eps, offset)
        if torch.allclose(found.double(), expected, rtol=tolerance, atol=0):
            return offset
    return None


@torch.no_grad()
def _is_swiglu(module: Model) -> bool:
    children: dict[str, Any] = dict(module.named_children())
    if set(children) != set(_MLP):
        return False
    act_fn = children["act_fn"]
    if type(act_fn).__name__ not in ("SiLU", "SiLUActivation") or children["gate_proj"].weight.device.type != "cpu":
        return False
    # Small layers in place of its own, which may be quantised, or drop a part of their input.
    gate_proj, up_proj, down_proj = (_small_linear(seed) for seed in range(3))
    twin = copy.copy(module)
    twin.__dict__["_modules"] = dict(zip(_MLP, (gate_proj, up_proj, down_proj, act_fn), strict=True))
    x = _probe(_SMALL, torch.float32)
    try:
        found = type(module).forward(twin, x)
    except Exception:
        # It takes something else.
        return False
    return torch.equal(found, down_proj(act_fn(gate_proj(x)) * up_proj(x)))


def _small_linear(seed: int) -> nn.Linear:
    layer = nn.Linear(_SMALL, _SMALL, bias=False, device="meta")
    weight = torch.randn(_SMALL, _SMALL, generator=torch.Generator().manual_seed(seed), device="cpu")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def _projections(module: Model) -> tuple[str, ...]:
    """The names of its linear layers that read the same x, if it has such."""
    for names in _SAME_INPUT:
        layers: list[Any] = [getattr(module, name, None) for name in names]
        known = all(isinstance(layer, AdaptedLayer) or is_linear(layer) for layer in layers)
        if known and len({layer.in_features for layer in layers}) == 1:
            return names
    return ()


def _rotating(forward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward` with its rotary position embedding by `ops.rotary`, if it has one that we know.

    The function's code with other globals: its module's, as they are now, but for that name. So nobody else who uses
    the module sees a difference.
    """
    plain = inspect.unwrap(forward)
    original = plain.__globals__.get(_ROTARY)
    if original is None or _ROTARY not in plain.__code__.co_names or not _is_rotary(original):
        return forward

    @wraps(original)
    def rotated(*args: Any, **kwargs: Any) -> Any:
        # With other arguments it may be something else.
        if kwargs or len(args) != len(_ROTARY_ARGUMENTS):
            return original(*args, **kwargs)
        q, k, cos, sin = args
        if not all(takes_rotary(t, cos, sin) for t in (q, k)):
            return original(q, k, cos, sin)
        return rotary(q, cos, sin), rotary(k, cos, sin)

    made = _with_rotary(forward, rotated)

    @wraps(forward)
    def wrapped(self: Model, *args: Any, **kwargs: Any) -> Any:
        # Dynamo looks globals up in the module.
        return (forward if torch.compiler.is_compiling() else made)(self, *args, **kwargs)

    return wrapped


def _with_rotary(function: Callable[..., Any], rotated: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, made anew with `rotated` for its module's. What a decorator wraps is made anew too."""
    closure, inner = function.__closure__, getattr(function, "__wrapped__", None)
    if inner is not None:
        cell = CellType(_with_rotary(inner, rotated))
        closure = tuple(cell if old.cell_contents is inner else old for old in closure or ())
    module = {**function.__globals__, _ROTARY: rotated}
    made = FunctionType(function.__code__, module, function.__name__, function.__defaults__, closure)
    made.__kwdefaults__ = function.__kwdefaults__
    return made


@torch.no_grad()
def _is_rotary(function: Callable[..., Any]) -> bool:
    q, k = (_probe(2 * heads * 3 * 8, torch.float32)[0].view(2, heads, 3, 8) for heads in (2, 1))
    cos, sin = _probe(2 * 3 * 8, torch.float32).view(2, 2, 3, 8)
    try:
        if tuple(inspect.signature(function).parameters)[:4] != _ROTARY_ARGUMENTS:
            return False
        found = function(q, k, cos, sin)
        expected = (reference.rotary(t.double(), cos.double(), sin.double()) for t in (q, k))
        return all(torch.allclose(a.double(), b, rtol=0, atol=1e-5) for a, b in zip(found, expected, strict=True))
    except Exception:
        # Angles of another shape, for one: GPT-OSS's have half as many columns.
        return False


# Arguments of attention that read another sequence for its keys and values.
_OTHER_SEQUENCE = ("key_value_states", "encoder_hidden_states")


def _grouped(forward: Callable[..., Any], names: tuple[str, ...]) -> Callable[..., Any]:
    """`forward`, in which the adapted layers of these names are computed by one call; its signature is kept."""
    parameters = list(inspect.signature(forward).parameters)[1:]
    places = [parameters.index(name) for name in _OTHER_SEQUENCE if name in parameters]

    @wraps(forward)
    def wrapped(self: Model, *args: Any, **kwargs: Any) -> Any:
        group = None
        crosses = any([kwargs.get(name) is not None for name in _OTHER_SEQUENCE])
        crosses = crosses or any([place < len(args) and args[place] is not None for place in places])
        if not crosses and not self.lora_kernels_apart and not torch.compiler.is_compiling():
            group = open_group([getattr(self, name) for name in names])
        if group is None:
            return forward(self, *args, **kwargs)
        try:
            result = forward(self, *args, **kwargs)
        finally:
            group.close()
        if group.idle and not self.training and not torch.is_grad_enabled():
            # They read different inputs. Not told in training: backward may run this again, and must do the same.
            self.lora_kernels_apart = True
        return result

    return wrapped


def _register_attention() -> None:
    """Have transformers' "sdpa" ask `_takes_attention` first. Under its own name, since masks, checks of configs and
    saved files go by that."""
    transformers: Any = sys.modules.get("transformers")
    if not hasattr(transformers, "AttentionInterface"):
        return
    sdpa = transformers.AttentionInterface()["sdpa"]
    if not hasattr(sdpa, "lora_kernels_attention"):
        transformers.AttentionInterface.register("sdpa", _attention(sdpa))


def _attention(sdpa: Callable[..., Any]) -> Callable[..., Any]:
    """`sdpa`, an attention function of transformers, with `causal_attention` where that applies."""

    @wraps(sdpa)
    def wrapped(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        plain = attention_mask is None and not dropout and causal is True
        plain = plain and all(value is None or value is False or name in _IGNORED for name, value in kwargs.items())
        if plain and getattr(module, "lora_kernels_attention", False) and _takes_attention(query, key, value):
            # In the layout [B, T, H, D].
            return causal_attention(query, key, value, scaling).transpose(1, 2), None
        options = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal, **kwargs}
        return sdpa(module, query, key, value, attention_mask, **options)

    vars(wrapped)["lora_kernels_attention"] = True
    return wrapped


def _takes_attention(query: Tensor, key: Tensor, value: Tensor) -> bool:
    B, H, T, D = query.shape
    return (
        is_fused(query)
        and key.shape == value.shape == (B, key.shape[1], T, D)
        and key.dtype == value.dtype == query.dtype
        and H % key.shape[1] == 0
        and T >= _MIN_ROWS
        and B * T >= _MIN_TOKENS
        and D <= MAX_HEAD_DIM
        and cpu.isa() in _ATTENTION_ISAS
        and (T <= _MAX_NATIVE_ROWS or query.dtype == torch.float32 or not cpu.native_bfloat16())
    )


def _probe(size: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(2, size, generator=torch.Generator().manual_seed(0), device="cpu").to(dtype)


def _is_stack(module: Model) -> bool:
    """Whether the module has a list of layers of which some part was fused: the decoder itself."""
    lists = (child for child in module.children() if isinstance(child, nn.ModuleList))
    return any("forward" in vars(part) for layers in lists for part in layers.modules())


def _norm_forward(self: Model, hidden_states: Tensor) -> Tensor:
    if not is_fused(hidden_states, self.weight):
        return type(self).forward(self, hidden_states)
    return rms_norm(hidden_states, self.weight, _norm_eps(self), self.lora_kernels_offset)


def _head_forward(self: nn.Linear, x: Tensor) -> Tensor:
    return frozen_linear(x, self.weight, self.bias)


def _mlp_forward(self: Model, x: Tensor) -> Tensor:
    if not is_fused(x):
        return type(self).forward(self, x)
    return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


for _function in (_norm_forward, _head_forward, _mlp_forward):
    # By which pickle looks a bound method up in its module, and finds the class's own.
    _function.__name__ = "forward"


def _recomputing(forward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward` inside `recomputing`, its signature kept, which others look at."""

    @wraps(forward)
    def wrapped(self: Model, *args: Any, **kwargs: Any) -> Any:
        # torch.func's transforms refuse hooks on saved tensors.
        if not torch.is_grad_enabled() or torch.compiler.is_compiling() or backends.by_formula():
            return forward(self, *args, **kwargs)
        with recomputing():
            return forward(self, *args, **kwargs)

    return wrapped
