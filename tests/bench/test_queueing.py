"""The script that times what Python takes to queue a layer, over drivers that launch nothing."""

import json
import subprocess
import sys

import pytest
from places import ROOT, environment

pytest.importorskip("triton")
pytest.importorskip("lora_kernels._simt")


def test_every_way_is_timed(tmp_path):
    output = tmp_path / "queueing.json"
    command = [sys.executable, ROOT / "benchmarks/queueing.py", "--rounds", "1", "--output", output]
    subprocess.run(command, env=environment(OMP_NUM_THREADS="1"), check=True, capture_output=True)
    results = json.loads(output.read_text())["results"]
    ways = {f"{way}, {call}" for way in ("extension", "kept", "Triton", "CUDA C++") for call in ("forward", "backward")}
    assert len(results) == 3
    for timed in results.values():
        assert set(timed) == ways and all(times["median_ms"] > 0 for times in timed.values())
