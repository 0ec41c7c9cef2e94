"""PEFT's own tests on models whose LoRA layers run on our kernels.

    python tools/peft_suite.py FOLDER [--plain] [arguments of pytest]

FOLDER is PEFT's source distribution, of the version that is installed, unpacked. Its tests are copied to a temporary
folder and run there. Each model that PEFT puts LoRA layers into is passed to `fuse_peft` at once; with --plain none is,
which shows what the tests do by themselves. Without arguments for pytest the tests of linear layers run, which need no
network. PEFT's tests import diffusers; `pip install --no-deps diffusers` is enough.

A line at the end counts the fused layers and their calls.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from functools import wraps
from pathlib import Path
from typing import Any

_DEFAULT = ["tests/test_custom_models.py", "-k", "MLP and LoraConfig and not AdaLora and not Velora and not Randlora"]
counted: Counter[str] = Counter()


def pytest_configure(config: Any) -> None:
    """Has PEFT fuse what it injects; pytest calls it in each of its processes, with this file as a plugin."""
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import BaseTuner

    from lora_kernels.integrations import peft as ours

    inject_adapter, takes, forward = BaseTuner.inject_adapter, ours._Fused._takes, ours._Fused.forward

    @wraps(inject_adapter)
    def injected(self: Any, model: Any, *args: Any, **kwargs: Any) -> None:
        inject_adapter(self, model, *args, **kwargs)
        if any(isinstance(module, LoraLayer) for module in model.modules()):
            counted["layers fused"] += len(ours.fuse_peft(model).fused)

    @wraps(takes)
    def taking(self: Any, x: Any, names: Any) -> bool:
        taken = takes(self, x, names)
        counted["of them by PEFT's own forward"] += not taken
        return taken

    @wraps(forward)
    def called(self: Any, *args: Any, **kwargs: Any) -> Any:
        counted["calls"] += 1
        return forward(self, *args, **kwargs)

    BaseTuner.inject_adapter = injected
    for kind in ours._FUSED.values():
        kind._takes, kind.forward = taking, called


def pytest_sessionfinish(session: Any) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["counted"] = dict(counted)


def pytest_testnodedown(node: Any) -> None:
    counted.update(getattr(node, "workeroutput", {}).get("counted", {}))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    names = ("layers fused", "calls", "of them by PEFT's own forward")
    terminalreporter.write_line(", ".join(f"{counted[name]} {name}" for name in names))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--plain", action="store_true", help="fuse nothing")
    options, arguments = parser.parse_known_args()
    if not (options.folder / "tests" / "test_custom_models.py").is_file():
        parser.error(f"{options.folder} holds no tests/test_custom_models.py; allowed: PEFT's source distribution")
    plugin = [] if options.plain else ["-p", Path(__file__).stem]
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(options.folder / "tests", Path(folder, "tests"))
        # Its tests import each other as a package, which the distribution doesn't make of them.
        Path(folder, "tests", "__init__.py").touch()
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "--rootdir",
            folder,
            "-c",
            os.devnull,
        ]
        environment = {"HF_HUB_OFFLINE": "1", **os.environ, "PYTHONPATH": path}
        return subprocess.call(
            [*command, "--rootdir", folder, *plugin, *(arguments or _DEFAULT)], cwd=folder, env=environment
        )


if __name__ == "__main__":
    sys.exit(main())
