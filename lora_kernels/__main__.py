"""`python -m lora_kernels`: the same as `lora-kernels`."""

from lora_kernels.cli import app

app()
