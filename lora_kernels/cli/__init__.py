"""Where `lora-kernels` and `python -m lora_kernels.cli` start; the commands are in `lora_kernels.cli.commands`.

Their packages come with the extra `train`. Without it one line says so, and `doctor` works.
"""

import sys

# What the extra `train` installs, as Python imports it, and what comes with these.
_TRAIN = {
    *("accelerate", "gguf", "matplotlib", "pyarrow", "yaml", "rich", "transformers", "typer"),
    *("click", "huggingface_hub", "tokenizers"),
}


def not_installed(error: ModuleNotFoundError) -> str | None:
    """What to install where a package of the extra `train` is missing; None for any other module."""
    package = (error.name or "").partition(".")[0]
    if package not in _TRAIN:
        return None
    return f"the Python package {package} is not installed: pip install 'lora-kernels[train]'"


def app() -> None:
    """Runs the command that sys.argv names."""
    try:
        from lora_kernels.cli.commands import app as run
    except ModuleNotFoundError as error:
        message = not_installed(error)
        if message is None:
            raise
        if sys.argv[1:] != ["doctor"]:
            print(f"error: {message} (`lora-kernels doctor` works without it)", file=sys.stderr)
            sys.exit(2)
        from lora_kernels.cli.doctor import doctor

        doctor()
        return
    run()
