"""The command line: `lora-kernels sft | reward | ppo | dpo | compare | generate | merge | export | data | ...`.

torch and transformers are imported inside the commands, so that --help is quick.
"""

import functools
import json
import os
import re
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from lora_kernels.cli import not_installed
from lora_kernels.cli.doctor import doctor
from lora_kernels.cli.flags import flags_of
from lora_kernels.files import new_directory, replacing
from lora_kernels.methods.registry import METHODS
from lora_kernels.train.config import DPOConfig, PPOConfig, RewardConfig, SFTConfig, TrainConfig, read_yaml

app = typer.Typer(
    name="lora-kernels",
    help="Fine-tune causal language models with fused LoRA kernels.",
    epilog="Exit code 2 is an error that you can mend; LORA_KERNELS_TRACEBACK=1 shows where it was raised.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


_SAME_ERROR_SECONDS = 5.0


def _rank() -> int:
    """The number of this process among those that torchrun, accelerate or an MPI started; 0 for the first."""
    names = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
    return next((int(os.environ[name]) for name in names if name in os.environ), 0)


def _user_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Turn errors that the user can mend into one line on stderr and exit code 2."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        rank = _rank()
        # What a warning says is for the user; which of our lines said it is not. Other processes say the same.
        warnings.formatwarning = lambda message, *_, **__: "" if rank else f"warning: {message}\n"
        try:
            command(*args, **kwargs)
        except (ValueError, OSError, FloatingPointError, yaml.YAMLError, ModuleNotFoundError) as error:
            message: str | None = " ".join(str(error).split()) or type(error).__name__
            if isinstance(error, ModuleNotFoundError):
                message = not_installed(error)
            if message is None or os.environ.get("LORA_KERNELS_TRACEBACK"):
                raise
            if rank:
                # The first process says the same, and a launcher then ends this one; or it is an error of this one.
                time.sleep(_SAME_ERROR_SECONDS)
                message = f"process {rank}: {message}"
            typer.secho(f"error: {message}", fg=typer.colors.RED, err=True)
            raise typer.Exit(2) from error

    return wrapped


def _train(run: Callable[[Any], Any], settings: TrainConfig, written: str) -> None:
    """run(settings), then say what it has written; a signal ends the process with 128 + its number, and says so."""
    from lora_kernels.train.stopping import ended_by_signals

    with ended_by_signals(settings.output_dir, say=_rank() == 0):
        run(settings)
    if _rank() == 0:
        typer.echo(f"{written}: {settings.output_dir}")


_ConfigFile = Annotated[
    Path | None, typer.Option(help="YAML file with the same names, underscores for dashes. Flags override it.")
]


def _settings(config_class: type[TrainConfig], config: Path | None, flags: dict[str, Any]) -> Any:
    """The config that the command line means, its backend checked before a model is loaded."""
    given = {name: value for name, value in flags.items() if value is not None}
    if config is None:
        settings = config_class.from_dict(given, source="command line")
    else:
        settings = config_class.from_yaml(config, **given)
    _check_backend(settings.backend)
    return settings


@app.command()
@_user_errors
@flags_of(SFTConfig)
def sft(*, config: _ConfigFile = None, **flags: Any) -> None:
    """Supervised fine-tuning of a causal LM on instruction, chat or completion records."""
    settings = _settings(SFTConfig, config, flags)
    from lora_kernels.train.sft import run_sft

    _train(run_sft, settings, "adapter, metrics and loss curve")


@app.command()
@_user_errors
@flags_of(PPOConfig)
def ppo(*, config: _ConfigFile = None, **flags: Any) -> None:
    """Reinforcement learning from a reward model or any Python function, by PPO; --data are prompts."""
    settings = _settings(PPOConfig, config, flags)
    from lora_kernels.train.ppo.trainer import run_ppo

    _train(run_ppo, settings, "adapter, metrics, samples and plots")


@app.command()
@_user_errors
@flags_of(RewardConfig)
def reward(*, config: _ConfigFile = None, **flags: Any) -> None:
    """Train a reward model on preference pairs: adapters and a scalar head on the last token."""
    settings = _settings(RewardConfig, config, flags)
    from lora_kernels.train.reward import run_reward

    _train(run_reward, settings, "adapter with head, metrics and plots")


@app.command()
@_user_errors
@flags_of(DPOConfig)
def dpo(*, config: _ConfigFile = None, **flags: Any) -> None:
    """Direct preference optimisation on preference pairs; the reference is the model as it starts."""
    settings = _settings(DPOConfig, config, flags)
    from lora_kernels.train.dpo import run_dpo

    _train(run_dpo, settings, "adapter, metrics and loss curve")


def _option(default: Any, panel: str, text: str) -> Any:
    return typer.Option(default, help=text, rich_help_panel=panel)


@app.command()
@_user_errors
@flags_of(SFTConfig)
def compare(
    *,
    config: Path | None = _option(
        None, "Comparison", "YAML file of sft's settings, and methods: {name: {settings of that run}}."
    ),
    methods: str | None = _option(None, "Comparison", f"Names with commas. Default: {','.join(METHODS)}."),
    prompts: int = _option(64, "Comparison", "Held-out records to answer, for the rate of exact matches."),
    max_new_tokens: int = _option(64, "Comparison", "Longest answer, in tokens."),
    **flags: Any,
) -> None:
    """Train several methods on the same data and steps; a table of what each costs and reaches.

    All of sft's flags are shared by the runs; what one has for itself, such as its lr, is said in the file's methods.
    Each run has a directory in --output-dir, and one that has ended is not repeated.
    """
    given = {name: value for name, value in flags.items() if value is not None}
    settings = {**(read_yaml(config) if config else {}), **given}
    described = settings.pop("methods", None) or dict.fromkeys(METHODS)
    described = dict.fromkeys(described) if isinstance(described, list) else described
    names = re.split(r"\s*,\s*", methods) if methods else described
    from lora_kernels.train.compare import TABLE, markdown, plan
    from lora_kernels.train.compare import compare as run_all

    runs = plan(settings, {name: dict(described).get(name) for name in names})
    output_dir = Path(settings.get("output_dir") or "outputs/compare")
    rows = run_all(runs, output_dir, prompts, max_new_tokens)
    typer.echo(markdown(rows), nl=False)
    typer.echo(f"{TABLE}.md, .json and .png, and a directory for each run: {output_dir}")


_MODEL = _option(None, "Model", "Base model, as for sft. Left out: the one that the adapter names.")
_QUANTIZE = _option(None, "Hardware", "nf4: load the base model's linear layers in 4 bits, as qlora does.")
_DOUBLE_QUANT = _option(False, "Hardware", "With nf4: quantise the blocks' scales too, as sft's option of that name.")
_DTYPE_HELP = "auto, float32, bfloat16, float16, or stored (as in the model's files)."


@app.command()
@_user_errors
def generate(
    *,
    model: str | None = _MODEL,
    adapter: Path | None = _option(None, "Model", "Adapter directory, as written by sft or PEFT."),
    chat_template: str | None = _option(
        None, "Model", "Jinja template, or a file with one, in place of the model's or adapter's."
    ),
    prompt: list[str] | None = _option(None, "Prompts", "User turn to answer; may be repeated."),
    prompts_file: list[str] | None = _option(
        None, "Prompts", ".txt, one prompt a line, or training data without its answers; several as for sft."
    ),
    output: Path | None = _option(None, "Prompts", "Write {prompt, answer} lines here, not to stdout."),
    max_new_tokens: int = _option(256, "Decoding", "Longest answer, in tokens."),
    temperature: float = _option(0.0, "Decoding", "0 is greedy."),
    top_p: float = _option(1.0, "Decoding", "Sample from the tokens that hold this much of the probability."),
    seed: int = _option(0, "Decoding", "Of the sampling."),
    batch_size: int = _option(8, "Hardware", "Prompts answered at once."),
    dtype: str = _option("auto", "Hardware", _DTYPE_HELP),
    quantize: str | None = _QUANTIZE,
    double_quant: bool = _DOUBLE_QUANT,
    backend: str = _option("auto", "Hardware", "Kernels to use; see lora-kernels doctor."),
) -> None:
    """Answer prompts with a model, or a model and an adapter.

    One --prompt prints its answer; several, or a file, print one JSON object a line.
    """
    prompts = _read_prompts(prompt or [], prompts_file)
    _check_backend(backend)
    import torch

    from lora_kernels.backends import backend_option
    from lora_kernels.models.generate import generate as generate_texts

    network, tokenizer = _load(model, adapter, dtype, chat_template, quantize, double_quant, fuse=True)
    network.to("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(seed)
    with backend_option(backend):
        answers = generate_texts(network, tokenizer, prompts, max_new_tokens, batch_size, temperature, top_p)
    if output is None and len(prompts) == 1 and not prompts_file:
        typer.echo(answers[0])
        return
    pairs = zip(prompts, answers, strict=True)
    lines = [json.dumps({"prompt": text, "answer": answer}, ensure_ascii=False) + "\n" for text, answer in pairs]
    if output is None:
        typer.echo("".join(lines), nl=False)
    else:
        with replacing(output) as temporary:
            temporary.write_text("".join(lines), encoding="utf-8")


@app.command()
@_user_errors
def merge(
    *,
    adapter: Path = _option(..., "Model", "Adapter directory, as written by sft or PEFT."),
    output: Path = _option(..., "Model", "Directory for the merged model; must not exist or be empty."),
    model: str | None = _MODEL,
    dtype: str = _option("stored", "Hardware", _DTYPE_HELP),
    quantize: str | None = _option(
        None, "Hardware", "nf4: merge into the 4-bit base, and write it as bitsandbytes does; tells the cost."
    ),
    double_quant: bool = _DOUBLE_QUANT,
) -> None:
    """Fold an adapter into its base model: a plain Hugging Face directory, tokenizer included."""
    from lora_kernels.io.whole_model import is_model_directory
    from lora_kernels.methods import merge as merge_adapters
    from lora_kernels.models.generate import stop_at_turn_end

    if is_model_directory(adapter):
        raise ValueError(f"--adapter {adapter} holds a whole model: there is nothing to merge")
    with new_directory(output) as staged:
        network, tokenizer = _load(model, adapter, dtype, None, quantize, double_quant)
        merge_adapters(network, quantize)
        stop_at_turn_end(network, tokenizer)
        if quantize:
            from lora_kernels.io.nf4 import save_nf4_model

            typer.echo(str(network.merge_cost))
            save_nf4_model(network, staged)
        else:
            network.save_pretrained(staged)
        tokenizer.save_pretrained(staged)
    typer.echo(f"merged model: {output}")


@app.command()
@_user_errors
def export(
    *,
    gguf: Path = _option(..., "Model", "The file to write; one that exists is replaced."),
    model: str | None = _MODEL,
    adapter: Path | None = _option(None, "Model", "Adapter directory, as written by sft or PEFT."),
    merge: bool = _option(False, "Model", "Write the whole model with the adapter in its weights, not the adapter."),
    dtype: str = _option(
        "stored", "Model", "Of the matrices: stored (as in the files), float32, float16, bfloat16 or q8_0."
    ),
) -> None:
    """Write an adapter, or a model, as a GGUF file for llama.cpp: Llama, Mistral, Qwen2 and Qwen3.

    The adapter's file is applied to that of its base model: llama-cli -m base.gguf --lora adapter.gguf. Without an
    adapter, or with --merge, the file is a whole model, tokenizer and chat template included.
    """
    from lora_kernels.io import gguf_export
    from lora_kernels.io.whole_model import is_model_directory
    from lora_kernels.methods import merge as merge_adapters
    from lora_kernels.models.generate import stop_at_turn_end

    gguf_export.check_dtype(dtype)
    whole = adapter is None or is_model_directory(adapter)
    if merge and whole:
        raise ValueError("--merge needs an adapter; without it, a whole model is written as it is")
    # What is merged is rounded once, to the file's dtype.
    network, tokenizer = _load(model, adapter, "float32" if dtype == "q8_0" else dtype, None, None, False)
    if whole or merge:
        if merge:
            merge_adapters(network)
        stop_at_turn_end(network, tokenizer)
        gguf_export.save_gguf(network, tokenizer, gguf, dtype)
    else:
        gguf_export.save_gguf_adapter(network, gguf, dtype)
    typer.echo(f"{'model' if whole or merge else 'adapter'} for llama.cpp: {gguf}")


data = typer.Typer(name="data", help="Check training files, and label preference pairs.", no_args_is_help=True)
app.add_typer(data)


@data.command("check")
@_user_errors
def data_check(
    *,
    files: Annotated[
        list[str],
        typer.Argument(help="Data for sft, reward or dpo, or prompts; as --data of sft.", show_default=False),
    ],
    model: str | None = _option(None, "Model", "Count tokens and show an example with this model's tokenizer."),
    chat_template: str | None = _option(None, "Model", "Jinja template, or a file with one, in place of the model's."),
    max_length: int | None = _option(None, "Model", "Count the records that have more tokens."),
    limit: int = _option(20, "Output", "Problems that are shown."),
) -> None:
    """Show what files hold, how long their texts are, and all that is wrong with them; exit code 2 if anything is."""
    from rich.console import Console
    from rich.panel import Panel

    from lora_kernels.data.check import KINDS, check_file, marked
    from lora_kernels.data.records import describe

    if model is None and (chat_template is not None or max_length is not None):
        raise ValueError("--chat-template and --max-length need --model")
    tokenizer = rows = None
    if model is not None:
        from lora_kernels.data.chat import set_chat_template
        from lora_kernels.io.models import load_tokenizer, vocab_size

        tokenizer, rows = load_tokenizer(model), vocab_size(model)
        set_chat_template(tokenizer, chat_template)
    found = check_file(files, tokenizer, max_length, rows)
    console = Console(highlight=False)
    good = len(next(iter(found.lengths.values()), ()))
    typer.echo(f"{describe(files)}: {KINDS.get(found.kind, 'nothing')}; {found.records} records, {good} of them good")
    if good:
        console.print(found.table())
    if found.too_long:
        typer.echo(f"{found.too_long} records have more than {max_length} tokens")
    for note in found.notes:
        typer.echo(note)
    for name, row in found.example.items():
        text = marked(*row, tokenizer, colour=console.is_terminal)
        console.print(Panel(text, title=f"first record, {name}: what is learned is marked", title_align="left"))
    for problem in found.problems[:limit]:
        typer.secho(problem, fg=typer.colors.RED, err=True)
    if found.problems:
        typer.secho(f"{len(found.problems)} problems", fg=typer.colors.RED, err=True)
        raise typer.Exit(2)


@data.command("label")
@_user_errors
def data_label(
    *,
    prompts_file: list[str] = _option(
        ..., "Data", ".txt, one prompt a line, or training data without its answers; several as for sft."
    ),
    output: Path = _option(
        ..., "Data", "Gets a {prompt, chosen, rejected} line for each decision; prompts in it are done."
    ),
    model: str | None = _MODEL,
    adapter: Path | None = _option(None, "Model", "Adapter directory, as written by sft or PEFT."),
    max_new_tokens: int = _option(256, "Decoding", "Longest answer, in tokens."),
    temperature: float = _option(1.0, "Decoding", "Of the sampling; above 0."),
    top_p: float = _option(1.0, "Decoding", "Sample from the tokens that hold this much of the probability."),
    seed: int = _option(0, "Decoding", "Of the sampling."),
    dtype: str = _option("auto", "Hardware", _DTYPE_HELP),
    quantize: str | None = _QUANTIZE,
) -> None:
    """Make preference data: sample two answers to each prompt, and press the key of the better one.

    Keys: 1, 2, s (skip), q (quit). Every decision is saved at once; run it again to go on.
    """
    prompts = _read_prompts([], prompts_file)
    if temperature <= 0:
        raise ValueError(f"--temperature must be > 0, got {temperature}")
    import torch
    from rich.console import Console

    from lora_kernels.data.label import label, read_key
    from lora_kernels.models.generate import generate as generate_texts

    network, tokenizer = _load(model, adapter, dtype, None, quantize, False)
    network.to("cuda" if torch.cuda.is_available() else "cpu")
    number = {json.dumps(prompt): index for index, prompt in enumerate(prompts)}

    def answer(prompt: Any, attempt: int) -> list[str]:
        # By the prompt's place: what is sampled for it does not depend on where a session started.
        torch.manual_seed(seed + number[json.dumps(prompt)] + len(prompts) * attempt)
        return generate_texts(network, tokenizer, [prompt] * 2, max_new_tokens, 2, temperature, top_p)

    made = label(prompts, answer, output, read_key, Console(highlight=False))
    typer.echo(f"{made} decisions added to {output}")


@app.command()
@_user_errors
def bench(
    *,
    suite: list[str] | None = _option(None, "What", "ops, train, memory or traffic; may be repeated. Default: all."),
    only: str | None = _option(None, "What", "Regular expression: only cases whose name it matches, as printed."),
    quick: bool = _option(False, "What", "Few and small cases: about 2 minutes on 2 cores."),
    dtype: str = _option("auto", "Hardware", "auto, float32, bfloat16 or float16, of weights and activations."),
    threads: int = _option(2, "Hardware", "Of each contender."),
    rounds: int | None = _option(None, "Hardware", "Times that each contender runs. Default: 11, or 5 with --quick."),
    budget: float | None = _option(None, "Hardware", "Seconds after which a case begins no further round (but 3)."),
    output_dir: Path = _option(Path("outputs/bench"), "Output", "Gets results.json, .csv, .md and .png."),
    compare: Path | None = _option(
        None, "Output", "An earlier results.json: names what became slower since; exit code 1 if anything did."
    ),
) -> None:
    """Time every op and whole training steps on the CPU beside their peers and the frozen model.

    Peers that are not installed are skipped, and the report says so: pip install 'lora-kernels\\[bench]'. Where a case
    or a contender fails, the others go on, and the exit code is 1. What times a GPU is benchmarks/gpu_check.py.
    """
    from lora_kernels.bench.cases import Settings
    from lora_kernels.bench.report import read_rows, regressions
    from lora_kernels.bench.run import SUITES
    from lora_kernels.bench.run import bench as run_bench
    from lora_kernels.io.models import resolve_dtype

    for name, value in (("threads", threads), ("rounds", rounds), ("budget", budget)):
        if value is not None and value <= 0:
            raise ValueError(f"{name} is {value}; allowed: above 0")
    kind = resolve_dtype(dtype)
    if kind == "auto":
        raise ValueError("dtype is 'stored', which a model's files say; allowed: auto, float32, bfloat16, float16")
    if compare is not None and not compare.is_file():
        raise FileNotFoundError(f"compare: {compare} does not exist")
    # Before the run, which may write to the same file.
    earlier = None if compare is None else read_rows(compare)
    settings = Settings(kind, threads, rounds or (5 if quick else 11), budget or (2.0 if quick else 20.0), quick)
    rows, failed = run_bench(suite or list(SUITES), settings, output_dir, only, typer.echo)
    typer.echo(f"results.json, .csv, .md and .png: {output_dir}")
    slower = []
    if earlier is not None:
        slower = regressions(rows, earlier)
        for line in slower:
            typer.secho(f"slower: {line}", fg=typer.colors.RED, err=True)
        typer.echo(f"{len(slower)} regressions against {compare}")
    if slower or failed:
        raise typer.Exit(1)


app.command()(doctor)


def _check_backend(name: str) -> None:
    from lora_kernels import backends

    try:
        backends.check(name, "backend")
        backends.selected()
    except RuntimeError as error:
        raise ValueError(str(error)) from None


def _load(
    model: str | None,
    adapter: Path | None,
    dtype: str,
    chat_template: str | None,
    quantize: str | None,
    double_quant: bool,
    fuse: bool = False,
) -> tuple[Any, Any]:
    from lora_kernels.io.adapters import load_adapter
    from lora_kernels.io.models import load_model
    from lora_kernels.io.peft import read_config
    from lora_kernels.io.whole_model import is_model_directory
    from lora_kernels.models.fuse import fuse_decoder

    if double_quant and not quantize:
        raise ValueError("--double-quant needs --quantize nf4")
    if adapter is not None and is_model_directory(adapter):
        # What full fine-tuning leaves is a whole model, tokenizer included.
        if model is not None and Path(model) != adapter:
            raise ValueError(f"--model {model} is not needed: --adapter {adapter} holds a whole model")
        model, adapter = str(adapter), None
    if adapter is not None:
        settings = adapter / "adapter_config.json"
        if not settings.is_file():
            raise FileNotFoundError(f"adapter directory {adapter} has no adapter_config.json")
        if model is None:
            model = read_config(settings).get("base_model_name_or_path")
            if not model:
                raise ValueError(f"{settings} names no base model; give it with --model")
    if model is None:
        raise ValueError("give --model, --adapter, or both")
    network, tokenizer = load_model(model, dtype, quantize, double_quant)
    if fuse:
        fuse_decoder(network)
    if adapter is not None:
        load_adapter(network, adapter)
        # What the adapter was trained with, where that was not the model's own.
        if chat_template is None and (adapter / "chat_template.jinja").is_file():
            chat_template = str(adapter / "chat_template.jinja")
    if chat_template is not None:
        from lora_kernels.data.chat import set_chat_template

        set_chat_template(tokenizer, chat_template)
    return network.eval(), tokenizer


def _read_prompts(given: list[str], files: list[str] | None) -> list[Any]:
    prompts: list[Any] = list(given)
    if files:
        from lora_kernels.data.prompts import read_prompts

        prompts += [prompt for prompt, _ in read_prompts(files)]
    if not prompts:
        raise ValueError("no prompt: give --prompt or --prompts-file")
    return prompts
