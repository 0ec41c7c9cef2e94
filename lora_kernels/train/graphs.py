"""A decoder's hidden states by CUDA graphs, for models so small that the GPU waits for Python."""

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F

from lora_kernels.backends import for_graphs

# Rows are padded to one of so many lengths: each has graphs of its own, with the gradients of all parameters.
_LENGTHS = 8
# Making a graph takes four passes, so only what comes back gets one.
_STEPS_BEFORE = 2
# Rotary embeddings that depend on the length of the row, pads included, and look at it.
_BY_LENGTH = ("dynamic", "longrope")


def check_graphs(accelerator: Accelerator) -> None:
    """Raises ValueError where there can be no CUDA graphs."""
    device, processes = accelerator.device.type, accelerator.num_processes
    if device != "cuda" or processes > 1:
        raise ValueError(f"cuda_graphs needs one process on a CUDA GPU, not {processes} on {device}")


def last_hidden_state(decoder: nn.Module, input_ids: Tensor) -> Tensor:
    """[B, T, H] of input_ids [B, T]."""
    return decoder(input_ids=input_ids, use_cache=False).last_hidden_state


class _LastHiddenState(nn.Module):
    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, input_ids: Tensor) -> Tensor:
        return last_hidden_state(self.decoder, input_ids)


@contextlib.contextmanager
def _one_sequence_a_row() -> Iterator[None]:
    """transformers, which can't look at positions while a graph is captured, would make an explicit attention mask in
    case that rows hold several sequences, and flash attention takes none."""
    from transformers import masking_utils

    name = "find_packed_sequence_indices"
    found = getattr(masking_utils, name, None)
    if found is None:
        yield
        return
    setattr(masking_utils, name, lambda position_ids: None)
    try:
        yield
    finally:
        setattr(masking_utils, name, found)


class DecoderGraphs:
    """A decoder's last hidden state, forward and backward as CUDA graphs (`torch.cuda.make_graphed_callables`).

    A training step is some thousand kernels, which Python queues more slowly than a small model's run. A graph queues
    them all at once. It holds one shape: input_ids [B, T] are padded on the right, where causal attention never looks,
    to the next of eight lengths up to `longest`; the first two batches of a shape run without a graph.

    The results are those of the decoder up to rounding and, where rows were padded, to which elements dropout takes.
    Its parameters must stay the tensors that they are. The gradients that backward leaves in a parameter are the
    graph's own memory, which the next backward writes to: before it, they must be set to None.

    Raises ValueError for a decoder whose rotary embedding depends on the length of the rows. Calls raise RuntimeError
    where the gradients aren't None, and where the decoder can't be captured, as one that looks at its tensors' values.
    """

    def __init__(self, decoder: nn.Module, longest: int) -> None:
        config = decoder.config
        rope = str(getattr(config, "rope_parameters", None)) + str(getattr(config, "rope_scaling", None))
        if any(kind in rope for kind in _BY_LENGTH):
            raise ValueError(f"cuda_graphs pads rows, on which this model's rotary embedding depends: {rope}")
        self.decoder = decoder
        self._step = 8 * math.ceil(longest / (8 * _LENGTHS))
        self._context = getattr(config, "max_position_embeddings", None) or longest + self._step
        # Of the parameters with a gradient one is enough to look at, since all are treated alike.
        self._trained = next((p for p in decoder.parameters() if p.requires_grad), None)
        self._seen: Counter[torch.Size] = Counter()
        self._graphed: dict[torch.Size, Callable[[Tensor], Any]] = {}
        self._pool: Any = None

    def __call__(self, input_ids: Tensor) -> Tensor:
        """The last hidden state [B, T, H] of input_ids [B, T], for training."""
        if self._trained is not None and self._trained.grad is not None:
            raise RuntimeError(
                "a gradient is not None: with graphs each backward needs optimizer.zero_grad() before it"
            )
        length = input_ids.shape[1]
        padded_length = max(length, min(self._context, self._step * math.ceil(length / self._step)))
        padded = F.pad(input_ids, (0, padded_length - length))
        self._seen[padded.shape] += 1
        if self._seen[padded.shape] <= _STEPS_BEFORE:
            # Padded too, so that dropout takes what it takes in a run that was interrupted.
            return last_hidden_state(self.decoder, padded)[:, :length]
        if padded.shape not in self._graphed:
            self._graphed[padded.shape] = self._capture(padded)
        return self._graphed[padded.shape](padded)[:, :length]

    def _capture(self, input_ids: Tensor) -> Callable[[Tensor], Any]:
        if self._pool is None:
            # One for all: of two graphs, the second starts when the first has gone back and forth.
            self._pool = torch.cuda.graph_pool_handle()
        module = _LastHiddenState(self.decoder)
        # The passes that warm up would take random numbers from those of training.
        with torch.random.fork_rng([input_ids.device]), for_graphs(), _one_sequence_a_row():
            try:
                sample = (input_ids.clone(),)
                return torch.cuda.make_graphed_callables(module, sample, allow_unused_input=True, pool=self._pool)
            except RuntimeError as error:
                name = type(self.decoder).__name__
                raise RuntimeError(f"{name} can't be captured as a CUDA graph; train it without cuda_graphs") from error
