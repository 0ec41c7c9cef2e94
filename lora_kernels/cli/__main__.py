"""`python -m lora_kernels.cli`."""

from lora_kernels.cli import app

app()
