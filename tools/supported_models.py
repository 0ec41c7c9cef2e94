"""What works with each family of models in transformers: docs/supported-models.md.

Each family is a tiny random model (tools/supported_families.py), tried in a process of its own.

    python tools/supported_models.py --all         tries every family that was last tried with other code, and goes on
                                                   where it was interrupted
    python tools/supported_models.py llama gemma2  tries these
    python tools/supported_models.py               writes the table anew from docs/supported-models.json
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import multiprocessing
import tempfile
import textwrap
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from supported_families import FIELDS, OTHERS, build
from torch import Tensor, nn

import lora_kernels
from lora_kernels import (
    LoRAConfig,
    NF4Linear,
    PrefixConfig,
    PromptConfig,
    fuse_decoder,
    inject,
    load_adapter,
    merge,
    save_adapter,
)
from lora_kernels.files import replacing
from lora_kernels.io.nf4 import load_nf4_model

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "docs" / "supported-models.md"
RESULTS = TABLE.with_suffix(".json")
# Seconds for a stage, of which most take less than one.
LIMIT = 200
# Of the largest value: float32 on tiny models, summed in another order.
LOGITS, GRADIENTS = 1e-4, 1e-3
# What a model's output is called.
OUTPUTS = ("logits", "logits_per_image", "last_hidden_state")


FAMILIES = [*FIELDS, *OTHERS]


class Wrong(Exception):
    """A value is not the one that it is compared with."""


class Untested(Exception):
    """The model or the peer cannot do it themselves."""


class Trial:
    """A tiny model of a family, and what earlier stages made of it."""

    gradients: dict[str, Tensor | None]
    adapted_logits: Tensor
    peft_logits: Tensor

    def __init__(self, family: str, directory: Path) -> None:
        self.directory = directory
        torch.manual_seed(0)
        self.model, self.inputs = build(family)
        self.model.eval()
        self.causal = family not in OTHERS
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in self.model.parameters():
                # Random enough for errors to show: norms that start as one, and matrices that start near zero.
                if parameter.dim() == 1:
                    parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
                elif parameter.std() < 0.05:
                    parameter.mul_(3)
        self.logits(self.model)
        self.model.save_pretrained(directory / "base")

    def fresh(self) -> Any:
        return copy.deepcopy(self.model)

    def adapted(self) -> Any:
        """The model with the adapter of the first stage."""
        if not hasattr(self, "gradients"):
            raise Untested("LoRA does not work")
        return load_adapter(self.fresh(), self.directory / "adapter")

    @property
    def ids(self) -> Tensor:
        """The rows of tokens of a causal language model."""
        if not self.causal:
            raise Untested("for causal language models only")
        return self.inputs["input_ids"]

    def output(self, model: Any, **changes: Any) -> Tensor:
        output = model(**self.inputs | changes)
        return next(output[name] for name in OUTPUTS if output.get(name) is not None)

    def logits(self, model: Any, **changes: Any) -> Tensor:
        with torch.no_grad():
            return self.output(model, **changes)

    def gradients_of(self, model: Any) -> dict[str, Tensor | None]:
        return self.step(model)[1]

    def step(self, model: Any) -> tuple[Tensor, dict[str, Tensor | None]]:
        """(logits, gradients of their mean square by the name of the tensor)."""
        model.zero_grad()
        torch.manual_seed(2)
        output = self.output(model)
        output.square().mean().backward()
        found = {}
        for name, parameter in model.named_parameters():
            name = name.removeprefix("_orig_mod.").removeprefix("base_model.model.")
            name = name.replace(".modules_to_save.default.", ".")
            for letter in "AB":
                name = name.replace(f".lora_{letter}.default.weight", f".lora_{letter.lower()}")
            if parameter.requires_grad:
                found[name] = parameter.grad
        return output.detach(), found


@contextmanager
def peer(name: str) -> Iterator[None]:
    """What raises inside is no fault of this project."""
    try:
        yield
    except Exception as error:
        raise Untested(f"{name}: {error}") from error


@contextmanager
def blaming(name: str, attempt: Callable[[], Any]) -> Iterator[None]:
    """What raises inside is no fault of this project where `attempt`, the same without it, raises as well."""
    try:
        yield
    except Exception:
        torch._dynamo.reset()
        with peer(name):
            attempt()
        raise


def same(what: str, found: Tensor, expected: Tensor, tolerance: float = LOGITS) -> None:
    error = ((found - expected).abs().max() / expected.abs().max().clamp(min=1e-6)).item()
    if not error <= tolerance:
        raise Wrong(f"{what} differ by {error:.0e} of the largest")


def same_gradients(found: dict[str, Tensor | None], expected: dict[str, Tensor | None]) -> None:
    if found.keys() != expected.keys():
        raise Wrong(f"other trained tensors: {sorted(found.keys() ^ expected.keys())[0]}")
    top = max((gradient.abs().max().item() for gradient in expected.values() if gradient is not None), default=0)
    for name, gradient in expected.items():
        other = found[name]
        if (other is None) != (gradient is None):
            raise Wrong(f"{'no' if other is None else 'an unexpected'} gradient for {name}")
        if gradient is not None and other is not None:
            scale = max(gradient.abs().max().item(), 1e-3 * top)
            if not (other - gradient).abs().max().item() <= GRADIENTS * scale:
                raise Wrong(f"gradient of {name} differs")


def perturb(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def answers(model: Any, ids: Tensor, padding: int = 0) -> Tensor:
    """Logits [6, vocabulary] of the greedy tokens after the one row `ids`, alone or beside another in a batch where it
    has `padding` pads on its left."""
    mask = torch.ones_like(ids)
    if padding:
        longer = torch.full((1, padding), 5)
        ids = torch.cat([torch.cat([torch.zeros_like(longer), ids], 1), torch.cat([longer, ids], 1)])
        mask = (torch.arange(ids.shape[1]) >= torch.tensor([[padding], [0]])).long()
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with torch.no_grad():
        out = model.generate(
            input_ids=ids, attention_mask=mask, return_dict_in_generate=True, output_logits=True, **options
        )
    return torch.stack([logits[0] for logits in out.logits])


def same_padded_answers(trial: Trial, model: Any) -> None:
    ids = trial.ids[:1, :20]
    if not torch.equal(answers(model, ids, padding=3).argmax(-1), answers(model, ids).argmax(-1)):
        raise Wrong("a row padded on its left is answered otherwise than alone")


def pads_work(trial: Trial) -> bool:
    ids = trial.ids[:1, :20]
    with peer("transformers"):
        padded, alone = answers(trial.model, ids, padding=3), answers(trial.model, ids)
    # Equal tokens may be luck.
    return (padded - alone).abs().max().item() <= LOGITS * alone.abs().max().item()


def lora(trial: Trial) -> None:
    """`inject` starts as the base model; the gradients are PEFT's."""
    from peft import LoraConfig, PeftModel, get_peft_model

    base = trial.logits(trial.model)
    model = inject(trial.fresh(), LoRAConfig(r=4, lora_alpha=8))
    same("logits at the start", trial.logits(model), base)
    perturb(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        save_adapter(model, trial.directory / "adapter")
    settings = LoraConfig(target_modules="all-linear")
    with blaming("PEFT", lambda: trial.gradients_of(get_peft_model(trial.fresh(), settings))):
        trial.gradients, trial.adapted_logits = trial.gradients_of(model), trial.logits(model)
    # What PEFT is known to read otherwise, `save_adapter` warns of.
    if misread := [str(warning.message) for warning in caught if str(warning.message).startswith("PEFT")]:
        raise Untested(misread[0])
    with peer("PEFT"), warnings.catch_warnings():
        # Of names that it changes and then misses.
        warnings.filterwarnings("error", message="Found missing adapter keys")
        theirs = PeftModel.from_pretrained(trial.fresh(), trial.directory / "adapter", is_trainable=True).eval()
        expected, trial.peft_logits = trial.gradients_of(theirs), trial.logits(theirs)
    same_gradients(trial.gradients, expected)


def files(trial: Trial) -> None:
    """PEFT loads what `save_adapter` wrote, and `load_adapter` what PEFT wrote, with the same logits."""
    from peft import LoraConfig, get_peft_model

    trial.adapted()
    if not hasattr(trial, "peft_logits"):
        raise Untested("PEFT does not take the model")
    same("logits in PEFT", trial.peft_logits, trial.adapted_logits)
    with peer("PEFT"):
        settings = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
        theirs = get_peft_model(trial.fresh(), settings).eval()
        theirs.save_pretrained(trial.directory / "peft")
        expected = trial.logits(theirs)
    same("logits of PEFT's file", trial.logits(load_adapter(trial.fresh(), trial.directory / "peft")), expected)


def merged(trial: Trial) -> None:
    """`merge` keeps the logits, and transformers loads what it saved with the same ones."""
    model: Any = merge(trial.adapted())
    same("merged logits", trial.logits(model), trial.adapted_logits)
    model.save_pretrained(trial.directory / "merged")
    loaded = type(model).from_pretrained(trial.directory / "merged").eval()
    same("logits after a reload", trial.logits(loaded), trial.adapted_logits)


def generate(trial: Trial) -> None:
    """With an adapter, a row that is padded on its left is answered as alone."""
    if not pads_work(trial):
        raise Untested("the base model itself answers padded rows otherwise")
    same_padded_answers(trial, trial.adapted())


def same_compiled(trial: Trial, model: Any) -> None:
    logits, gradients = trial.step(model)
    compiled_logits, compiled_gradients = trial.step(torch.compile(model, backend="aot_eager"))
    same("compiled logits", compiled_logits, logits)
    same_gradients(compiled_gradients, gradients)


def compiled(trial: Trial) -> None:
    """`torch.compile` gives the same logits and gradients (traced by dynamo and autograd, run without inductor)."""
    model, base = trial.adapted(), trial.fresh().requires_grad_(True)
    with blaming("torch.compile of the base model", lambda: same_compiled(trial, base)):
        same_compiled(trial, model)


def checkpointing(trial: Trial) -> None:
    """Gradient checkpointing in training mode gives the same gradients."""
    model = trial.adapted().train()
    if not model.supports_gradient_checkpointing:
        raise Untested("transformers has none for it")
    expected = trial.gradients_of(model)
    expected = {name: None if gradient is None else gradient.clone() for name, gradient in expected.items()}
    frozen = trial.fresh().requires_grad_(False).train()
    for each in (model, frozen):
        each.gradient_checkpointing_enable({"use_reentrant": False})
    with blaming("a frozen base model", lambda: trial.output(frozen)):
        same_gradients(trial.gradients_of(model), expected)


def fused(trial: Trial) -> None:
    """`fuse_decoder` and an adapter give the same logits and gradients."""
    model = trial.fresh()
    parts = fuse_decoder(model)
    same("logits", trial.logits(model), trial.logits(trial.model))
    trial.adapted()
    model = load_adapter(model, trial.directory / "adapter")
    same("logits with an adapter", trial.logits(model), trial.adapted_logits)
    same_gradients(trial.gradients_of(model), trial.gradients)
    if parts == 0:
        raise Untested("nothing in it to fuse")


def qlora(trial: Trial) -> None:
    """NF4 layers and files are bitsandbytes' bit for bit; over them, gradients are PEFT's on the same weights."""
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    if not trial.causal:
        raise Untested("for causal language models only")
    with blaming("transformers", lambda: AutoModelForCausalLM.from_pretrained(trial.directory / "base")):
        model = load_nf4_model(trial.directory / "base", torch.float32, progress=False)
    with peer("bitsandbytes"):
        settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        theirs = AutoModelForCausalLM.from_pretrained(
            trial.directory / "base", dtype=torch.float32, quantization_config=settings
        )
        theirs.save_pretrained(trial.directory / "nf4")
    written: dict[str, Tensor] = {}
    for file in (trial.directory / "nf4").glob("*.safetensors"):
        written |= load_file(file)
    loaded = load_nf4_model(trial.directory / "nf4", torch.float32, progress=False)
    state, dense = model.state_dict(), trial.fresh()
    with torch.no_grad():
        for name, layer in model.named_modules():
            if isinstance(layer, NF4Linear):
                dense.get_submodule(name).weight.copy_(layer.weight.dequantize())
                # bitsandbytes leaves subclasses of nn.Linear dense, as Falcon's.
                entries = ("weight", "weight.absmax") if f"{name}.weight.absmax" in written else ()
                for entry in entries:
                    if not torch.equal(state[f"{name}.{entry}"], written[f"{name}.{entry}"]):
                        raise Wrong(f"{name}.{entry} is not bitsandbytes'")
    same("logits", trial.logits(model), trial.logits(dense))
    quantised = {name for name, layer in model.named_modules() if isinstance(layer, NF4Linear)}
    # Where it quantises other layers, such as those whose weight the model itself uses, the models differ.
    if quantised == {name.removesuffix(".weight.absmax") for name in written if name.endswith(".weight.absmax")}:
        same("logits of bitsandbytes' file", trial.logits(loaded), trial.logits(model))
    trial.adapted()
    if not hasattr(trial, "peft_logits"):
        raise Untested("PEFT does not take the model")
    model = load_adapter(model, trial.directory / "adapter")
    with peer("PEFT"):
        expected = PeftModel.from_pretrained(dense, trial.directory / "adapter", is_trainable=True).eval()
        gradients = trial.gradients_of(expected)
    same_gradients(trial.gradients_of(model), gradients)


def _virtual_tokens(trial: Trial, config: Any) -> None:
    """Tokens that start as those of a text act as that text before each row; they train, and padded rows are right."""
    first = torch.tensor([7, 11, 13, 17])
    rows = torch.cat([first.expand(len(trial.ids), -1), trial.ids], 1)
    model = inject(trial.fresh(), config, lambda *_, **__: SimpleNamespace(input_ids=first.tolist()))
    same("logits", trial.logits(model), trial.logits(trial.model, input_ids=rows)[:, len(first) :])
    for name, gradient in trial.gradients_of(model).items():
        if gradient is None or not gradient.isfinite().all() or not gradient.any():
            raise Wrong(f"{name} has no gradient")
    if pads_work(trial):
        same_padded_answers(trial, model)


def prefix(trial: Trial) -> None:
    """Prefix tuning that starts from a text acts as that text, trains, and answers padded rows as alone."""
    _virtual_tokens(trial, PrefixConfig(num_virtual_tokens=4, init="text", init_text="text"))


def prompt(trial: Trial) -> None:
    """Prompt tuning, likewise."""
    _virtual_tokens(trial, PromptConfig(num_virtual_tokens=4, init="text", init_text="text"))


STAGES: dict[str, Callable[[Trial], None]] = {
    "LoRA": lora,
    "PEFT files": files,
    "merge": merged,
    "generate": generate,
    "compile": compiled,
    "checkpointing": checkpointing,
    "fused decoder": fused,
    "QLoRA": qlora,
    "prefix": prefix,
    "prompt": prompt,
}


def outcome(error: Exception) -> str:
    """What a cell says of a stage that raised."""
    text = " ".join(str(error).strip().partition("\n")[0].split())
    if isinstance(error, Wrong):
        return f"wrong: {text}"
    if isinstance(error, Untested):
        return f"untested: {text}"
    raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    if isinstance(error, ValueError) and raised_in.is_relative_to(Path(lora_kernels.__file__).parent):
        return f"refused: {text}"
    return f"error: {type(error).__name__}: {text}"


def _child(family: str, results: Connection) -> None:
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as directory:
        try:
            trial = Trial(family, Path(directory))
        except Exception as error:
            results.send(f"untested: no tiny model: {type(error).__name__}: {error}")
            return
        for stage in STAGES.values():
            try:
                stage(trial)
                results.send("yes")
            except Exception as error:
                results.send(outcome(error).replace(f"{directory}/", ""))


def try_family(family: str, limit: float = LIMIT) -> dict[str, str]:
    """{stage: "yes", or what is not so}; a crash or a stage that takes longer than `limit` seconds is an error."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(family, sender))
    process.start()
    sender.close()
    found: dict[str, str] = {}
    for stage in STAGES:
        try:
            found[stage] = receiver.recv() if receiver.poll(limit) else f"error: longer than {limit} s"
        except EOFError:
            process.join()
            last = next(reversed(found.values()), "")
            ended = last if last.startswith("untested: no tiny") else f"error: process ended with {process.exitcode}"
            found |= dict.fromkeys(list(STAGES)[len(found) :], ended)
            break
        if found[stage].startswith("error: longer"):
            found |= dict.fromkeys(list(STAGES)[len(found) :], "untested: an earlier stage took too long")
            break
    process.kill()
    process.join()
    return found


def code() -> str:
    """A hash of all that the results depend on here."""
    digest = hashlib.sha256(f"{torch.__version__} {transformers.__version__}".encode())
    for path in sorted([*(ROOT / "lora_kernels").rglob("*.py"), *ROOT.glob("tools/supported_*.py")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def read_results(path: Path = RESULTS) -> dict[str, dict[str, Any]]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def cell(text: str) -> str:
    text = " ".join(text.replace("|", "/").split())
    return text if len(text) <= 100 else f"{text[:97]}..."


def report(results: dict[str, dict[str, Any]]) -> str:
    whole = sum(all(text == "yes" for text in result["stages"].values()) for result in results.values())
    lines = [
        "# Supported models",
        "",
        f"What was tried with tiny random models of {len(results)} families in transformers; with {whole} of them",
        "everything works. Written by `python tools/supported_models.py`; tests compare it with the stored",
        "results, and these with the code for a few families. A family that isn't here was not tried.",
        "Those of transformers' mapping of causal language models are all here; they get text alone, also",
        "where they take images or sound.",
        "",
        *(
            line
            for name, stage in STAGES.items()
            for line in textwrap.wrap(f"- **{name}**: {stage.__doc__}", 100, subsequent_indent="  ")
        ),
        "",
        "A cell that isn't **yes** says why. *refused*: an error names the reason. *untested*: torch,",
        "transformers, PEFT or bitsandbytes cannot do it with this model, so there is nothing to compare",
        "with. *wrong* and *error* are faults: don't rely on that.",
        "",
        f"| family | {' | '.join(STAGES)} |",
        "|---" * (len(STAGES) + 1) + "|",
    ]
    for family in filter(results.get, FAMILIES):
        lines.append(f"| {family} | {' | '.join(cell(text) for text in results[family]['stages'].values())} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", metavar="family", help=f"of: {', '.join(FAMILIES)}")
    parser.add_argument("--all", action="store_true", help="every family that was last tried with other code")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the table is written beside it")
    arguments = parser.parse_args()
    if unknown := [family for family in arguments.families if family not in FAMILIES]:
        parser.error(f"unknown family {unknown[0]}; allowed: {', '.join(FAMILIES)}")
    results, now = read_results(arguments.results), code()
    families = arguments.families
    if arguments.all:
        families = [family for family in FAMILIES if results.get(family, {}).get("code") != now]
        results = {family: result for family, result in results.items() if family in FAMILIES}
    for number, family in enumerate(families, start=1):
        results[family] = {"code": now, "stages": try_family(family)}
        print(f"{number}/{len(families)} {family}: {results[family]['stages']}", flush=True)
        with replacing(arguments.results) as path:
            path.write_text(json.dumps(dict(sorted(results.items())), indent=1) + "\n", encoding="utf-8")
    with replacing(arguments.results.with_suffix(".md")) as path:
        path.write_text(report(results), encoding="utf-8")


if __name__ == "__main__":
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    # Once, for the processes of all families.
    import bitsandbytes  # noqa: F401
    import peft  # noqa: F401

    main()
