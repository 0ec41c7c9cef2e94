"""Moving hooks from a layer to its replacement, and the fast path of torch's encoders, which skips their layers."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

from torch import nn

# What decides whether one of torch's encoders reads the weights of its linear layers, by its fast path.
FAST_PATHS = {nn.TransformerEncoderLayer: "activation_relu_or_gelu", nn.TransformerEncoder: "use_nested_tensor"}
_HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_pre_hooks",
    "_backward_hooks",
    "_is_full_backward_hook",
    "_state_dict_pre_hooks",
    "_state_dict_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


def carry_hooks(replaced: nn.Module, module: nn.Module) -> None:
    """Gives `module` the hooks of `replaced`, in the same order, and `replaced` those of `module`.

    The dictionaries themselves change places, so that the handles that torch gave for the hooks still remove them.
    """
    ours, theirs = module.__dict__, replaced.__dict__
    for name in _HOOKS:
        ours[name], theirs[name] = theirs[name], ours[name]
    for hook in ours["_load_state_dict_pre_hooks"].values():
        if getattr(hook, "with_module", False):
            hook.module = weakref.ref(module)
    if hasattr(replaced, "_hf_hook") and replaced is not module:
        from accelerate.hooks import add_hook_to_module

        add_hook_to_module(module, replaced._hf_hook)


def add_hooks(wrapper: nn.Module, module: nn.Module) -> None:
    """Gives `module` the hooks of the wrapper of what it replaces, and leaves the wrapper without.

    Where both have hooks of one kind, the handles of the wrapper's no longer remove them.
    """
    ours, theirs = module.__dict__, wrapper.__dict__
    for name in _HOOKS:
        if theirs[name] and ours[name] and isinstance(ours[name], dict):
            ours[name].update(theirs[name])
            theirs[name].clear()
        elif theirs[name]:
            ours[name], theirs[name] = theirs[name], ours[name]


def shared_hooks(module: nn.Module) -> dict[int, Any]:
    """The memo for copy.deepcopy with which a copy of `module` shares the hooks inside, so that the handles that torch
    gave for them remove them there too. Hooks that are methods of its own parts are copied."""
    parts = {id(part): part for part in module.modules()}
    found = [getattr(part, name) for part in parts.values() for name in _HOOKS]
    return {
        id(hooks): hooks
        for hooks in found
        if isinstance(hooks, dict) and not any(id(getattr(h, "__self__", None)) in parts for h in hooks.values())
    }


def is_offloaded(module: nn.Module, outer: Iterable[nn.Module]) -> bool:
    """Whether accelerate keeps weights of `module`, which lies inside those of `outer`, elsewhere between its calls."""
    if not any(parameter.is_meta for parameter in module.parameters()):
        return False
    hooks = [getattr(part, "_hf_hook", None) for part in (*outer, *module.modules())]
    return any(getattr(each, "offload", False) for hook in hooks for each in getattr(hook, "hooks", (hook,)))


def set_fast_path(encoder: nn.Module, allowed: bool) -> None:
    """Lets a module of one of the kinds in FAST_PATHS take torch's fast path, or not; no effect on other modules.

    On that path, taken in evaluation, it reads the weights of its linear layers and never calls them.
    """
    for kind, switch in FAST_PATHS.items():
        if isinstance(encoder, kind):
            own = encoder.__dict__
            if not allowed:
                own.setdefault("_own_fast_path", getattr(encoder, switch, False))
                setattr(encoder, switch, False)
            elif "_own_fast_path" in own:
                setattr(encoder, switch, own.pop("_own_fast_path"))
