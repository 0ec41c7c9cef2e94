"""A decoder's hidden states by CUDA graphs, for models so small that the GPU waits for Python."""

from collections import Counter
from collections.abc import Callable

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F

from lora_kernels import strategy
from lora_kernels.parts import ceil_div

# Rows are padded to one of so many lengths: each has graphs of its own, with the gradients of all parameters.
_LENGTHS = 8
# A graph takes as long to make as some five steps, so only what comes back gets one.
_STEPS_BEFORE = 2


def check_graphs(accelerator: Accelerator) -> None:
    """Raises ValueError where there can be no CUDA graphs."""
    device, processes = accelerator.device.type, accelerator.num_processes
    if device != "cuda" or processes > 1:
        raise ValueError(f"cuda_graphs needs one process on a CUDA GPU, not {processes} on {device}")


class _LastHiddenState(nn.Module):
    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.decoder(input_ids=input_ids, use_cache=False).last_hidden_state


class DecoderGraphs:
    """A decoder's last hidden state, forward and backward as CUDA graphs (`torch.cuda.make_graphed_callables`).

    A training step is some thousand kernels, which Python queues more slowly than a small model's run. A graph queues
    them all at once. It holds one shape: input_ids [B, T] are padded on the right, where causal attention never looks,
    to the next of eight lengths up to `longest`; the first two batches of a shape run without a graph.

    The results are those of the decoder up to rounding and, where rows were padded, to which elements dropout takes.
    Its parameters must stay the tensors that they are. The gradients that backward leaves in a parameter without one
    are the graph's own memory, which the next backward writes to: there must be an optimizer step between any two.
    """

    def __init__(self, decoder: nn.Module, longest: int) -> None:
        self.decoder = decoder
        self._step = 8 * ceil_div(longest, 8 * _LENGTHS)
        self._seen: Counter[torch.Size] = Counter()
        self._graphed: dict[torch.Size, Callable[[Tensor], Tensor]] = {}
        self._pool = None

    def __call__(self, input_ids: Tensor) -> Tensor:
        """The last hidden state [B, T, H] of input_ids [B, T], for training."""
        length = input_ids.shape[1]
        padded = F.pad(input_ids, (0, self._step * ceil_div(length, self._step) - length))
        self._seen[padded.shape] += 1
        if self._seen[padded.shape] <= _STEPS_BEFORE:
            return self.decoder(input_ids=input_ids, use_cache=False).last_hidden_state
        if padded.shape not in self._graphed:
            self._graphed[padded.shape] = self._capture(padded)
        return self._graphed[padded.shape](padded)[:, :length]

    def _capture(self, input_ids: Tensor) -> Callable[[Tensor], Tensor]:
        if self._pool is None:
            # One for all: of two graphs, the second starts when the first has gone back and forth.
            self._pool = torch.cuda.graph_pool_handle()
        # The passes that warm up would take random numbers from those of training.
        with torch.random.fork_rng([input_ids.device]), strategy.for_graphs():
            sample = input_ids.clone()
            module = _LastHiddenState(self.decoder)
            return torch.cuda.make_graphed_callables(module, (sample,), allow_unused_input=True, pool=self._pool)
