"""Where the tests lie, and processes that import what the tests import."""

import os
import subprocess
import sys
from pathlib import Path

import torch

TESTS = Path(__file__).parent
ROOT = TESTS.parent


def environment(**variables):
    """This process's variables with its import path, and `variables` besides."""
    path = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
    return {**os.environ, "PYTHONPATH": path, **variables}


def run_python(code, *arguments, launcher=()):
    """`python -c code arguments`, or with a launcher the script `code`."""
    # As many threads as here: the order of a parallel sum, and so its last bit, depends on their number.
    variables = environment(OMP_NUM_THREADS=str(torch.get_num_threads()))
    command = [sys.executable, *launcher, *(["-c", code] if not launcher else [code]), *map(str, arguments)]
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=120, check=False)
