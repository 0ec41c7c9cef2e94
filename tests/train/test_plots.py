import json

import matplotlib.image
import numpy as np
import pytest

from lora_kernels.train.metrics import read_metrics
from lora_kernels.train.plots import plot_loss, plot_rewards, smooth


def write(path, records, tail=""):
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + tail, encoding="utf-8")
    return path


def test_smooth_is_the_weighted_mean_of_what_came_before():
    values = [3.0, 1.0, 2.0, 5.0]
    for length, actual in enumerate(smooth(values, 0.6), start=1):
        weights = [0.6 ** (length - 1 - index) for index in range(length)]
        expected = np.average(values[:length], weights=weights)
        assert actual == pytest.approx(expected, rel=1e-12)
    assert smooth(values, 0.0) == values
    assert smooth([], 0.9) == []
    with pytest.raises(ValueError, match=r"weight is 1.0; it must be in \[0, 1\)"):
        smooth(values, 1.0)


def colours(image, rgb):
    """Number of pixels near a colour."""
    return int((np.abs(image[..., :3] - np.array(rgb) / 255).max(-1) < 0.02).sum())


def test_plot_shows_training_and_evaluation(tmp_path):
    train = [{"step": step, "loss": 3.0 / step} for step in range(1, 30)]
    both = write(tmp_path / "both.jsonl", [*train, {"step": 15, "eval_loss": 2.0}, {"step": 29, "eval_loss": 1.0}])
    only_train = write(tmp_path / "train.jsonl", train)
    blue, orange = (0, 114, 178), (213, 94, 0)
    image = matplotlib.image.imread(plot_loss(both, tmp_path / "new" / "loss.png"))
    assert image.shape[0] >= 400 and image.shape[1] >= 700
    assert colours(image, blue) > 200 and colours(image, orange) > 50
    image = matplotlib.image.imread(plot_loss(only_train, tmp_path / "new" / "train.png"))
    assert colours(image, blue) > 200 and colours(image, orange) == 0
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["loss.png", "train.png"]


def test_plot_of_one_step(tmp_path):
    metrics = write(tmp_path / "m.jsonl", [{"step": 1, "loss": 2.0}])
    image = matplotlib.image.imread(plot_loss(metrics, tmp_path / "a.png"))
    assert image.std() > 0


def test_a_line_cut_short_is_left_out(tmp_path):
    path = write(tmp_path / "m.jsonl", [{"step": 1, "loss": 2.0}], tail='{"step": 2, "lo')
    assert read_metrics(path) == [{"step": 1, "loss": 2.0}]


def test_errors_name_file_and_line(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent.jsonl"):
        plot_loss(tmp_path / "absent.jsonl", tmp_path / "loss.png")
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2\n{"step": 3, "loss": 1.0}\n')
    with pytest.raises(ValueError, match=r"m.jsonl, line 2: not JSON"):
        plot_loss(path, tmp_path / "loss.png")
    path.write_text("3\n")
    with pytest.raises(ValueError, match=r"m.jsonl, line 1: not a JSON object"):
        read_metrics(path)
    with pytest.raises(ValueError, match="no record with a loss"):
        plot_loss(write(path, [{"step": 1, "lr": 0.1}]), tmp_path / "loss.png")
    assert not (tmp_path / "loss.png").exists()


def test_rewards_are_drawn(tmp_path):
    rng = np.random.default_rng(0)
    chosen, rejected = rng.normal(1, 1, 50), rng.normal(0, 1, 50)
    output = plot_rewards(chosen, rejected, [(0.6, 0.5, 20), (0.9, 0.8, 30)], tmp_path / "new" / "rewards.png")
    image = matplotlib.image.imread(output)
    assert colours(image, (0, 114, 178)) > 100 and image.shape[1] > image.shape[0]
    plot_rewards([1.0], [1.0], [(0.5, 0.0, 1)], output)
    with pytest.raises(ValueError, match="chosen and rejected must be as many and at least 1, got 0 and 0"):
        plot_rewards([], [], [], output)
