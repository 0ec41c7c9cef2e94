"""The script that times small layers."""

import json
import subprocess
import sys

import pytest
from places import ROOT, environment


def test_every_case_is_timed(tmp_path):
    pytest.importorskip("peft")
    output = tmp_path / "small.json"
    command = [sys.executable, ROOT / "benchmarks/small_layer.py", "--rounds", "1", "--output", output]
    subprocess.run(command, env=environment(OMP_NUM_THREADS="1"), check=True, capture_output=True)
    results = json.loads(output.read_text())["results"]
    assert len(results) == 4
    for timed in results.values():
        assert len(timed) == 2 and all(times["median_ms"] > 0 for times in timed.values())
