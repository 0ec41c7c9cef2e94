"""`lora-kernels data check` and `data label`, from files and from the command line."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from places import environment
from rich.console import Console
from tiny_chat import tiny_llama, tiny_tokenizer
from typer.testing import CliRunner

from lora_kernels.cli.commands import app
from lora_kernels.data.check import check_file, marked
from lora_kernels.data.label import append, label, mend
from lora_kernels.data.pairs import load_pairs
from lora_kernels.data.prompts import read_prompts

PAIR = {"prompt": "say one", "chosen": "one", "rejected": "two two"}


def run(*arguments, stdin=None):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin, env={"COLUMNS": "120"})


def write(path, *lines):
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    tiny_llama().save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


def test_check_names_every_problem_by_its_line(tmp_path):
    path = write(
        tmp_path / "pairs.jsonl",
        PAIR,
        '{"prompt": "p", "chosen": "c", "rej',
        {"prompt": "p", "chosen": "c", "rejected": "c"},
        {"prompt": "p", "chosen": " ", "rejected": "c"},
        {"instruction": "p", "output": "c"},
        {"prompt": "what?", "chosen": "four", "rejected": "ab"},
        "7",
    )
    found = check_file(path)
    assert (found.kind, found.records, found.unit) == ("preference", 6, "characters")
    assert found.lengths == {"prompt": [7, 5], "chosen": [3, 4], "rejected": [7, 2]}
    expected = [
        (2, "not JSON"),
        (3, "chosen and rejected are the same"),
        (4, "the chosen answer is blank"),
        (5, "expected preference pairs .* as before, got conversations"),
        (7, "expected preference pairs"),
    ]
    assert len(found.problems) == len(expected)
    for problem, (line, text) in zip(found.problems, expected, strict=True):
        assert problem.startswith(f"{path}:{line}: ")
        assert re.search(text, problem)


def test_check_of_the_other_kinds_and_of_nothing(tmp_path):
    sft = check_file(write(tmp_path / "sft.jsonl", {"instruction": "a", "input": "b", "output": "xyz"}, {"x": 1}))
    assert (sft.kind, sft.lengths) == ("sft", {"prompt": [4], "answer": [3]})
    assert len(sft.problems) == 1 and "sft.jsonl:2: expected one of" in sft.problems[0]
    prompts = check_file(write(tmp_path / "prompts.jsonl", {"prompt": "abc"}, {"prompt": [{"role": "user"}]}))
    assert (prompts.kind, prompts.lengths, len(prompts.problems)) == ("prompts", {"prompt": [3]}, 1)
    assert check_file(write(tmp_path / "empty.jsonl")).problems == [f"{tmp_path / 'empty.jsonl'}: no records"]
    (tmp_path / "list.json").write_text(json.dumps([PAIR]) + "]")
    assert len(check_file(tmp_path / "list.json").problems) == 1


def test_check_with_a_tokenizer_counts_what_is_learned(tmp_path):
    tokenizer = tiny_tokenizer()
    path = write(tmp_path / "pairs.jsonl", PAIR, {**PAIR, "chosen": "one " * 30})
    found = check_file(path, tokenizer, max_length=40)
    pairs = load_pairs(path, tokenizer, 1000)
    assert found.unit == "tokens" and not found.problems
    assert found.lengths["chosen"] == [int(mask.sum()) for _, mask in pairs.chosen]
    assert found.lengths["prompt"] == [int((~mask).sum()) for _, mask in pairs.chosen]
    assert found.too_long == 1
    text = marked(*found.example["rejected"], tokenizer, colour=False)
    assert text.plain == "<|im_start|>user\nsay one<|im_end|>\n<|im_start|>assistant\n⟦two two<|im_end|>⟧"
    coloured = marked(*found.example["rejected"], tokenizer)
    assert coloured.plain == text.plain.replace("⟦", "").replace("⟧", "")
    green = "".join(coloured.plain[span.start : span.end] for span in coloured.spans if "green" in str(span.style))
    assert green == "two two<|im_end|>"
    assert marked([1, 5], np.array([False, False]), tokenizer, colour=False).plain.startswith("<|im_start|>")


def test_check_command(tmp_path, model_dir):
    good = write(tmp_path / "good.jsonl", PAIR)
    result = run("data", "check", good)
    assert result.exit_code == 0, result.output
    assert "preference pairs (reward, dpo); 1 records, 1 of them good" in result.stdout
    result = run("data", "check", good, "--model", model_dir, "--max-length", 8)
    assert result.exit_code == 0, result.output
    assert "⟦two two<|im_end|>⟧" in result.stdout and "1 records have more than 8 tokens" in result.stdout
    bad = write(tmp_path / "bad.jsonl", PAIR, *[{**PAIR, "rejected": "one"}] * 3)
    result = run("data", "check", bad, "--limit", 2)
    assert result.exit_code == 2
    assert result.stderr.count("are the same") == 2 and "3 problems" in result.stderr
    result = run("data", "check", tmp_path / "absent.jsonl")
    assert result.exit_code == 2 and "does not exist" in result.stderr
    result = run("data", "check", good, "--max-length", 8)
    assert result.exit_code == 2 and "need --model" in result.stderr


def quiet():
    return Console(file=io.StringIO(), width=80)


def keys(text):
    waiting = iter(text)
    return lambda: next(waiting, "")


def answers(prompt, attempt):
    return [f"first {prompt}", f"second {prompt}"]


def test_label_appends_decisions_and_goes_on_where_it_stopped(tmp_path):
    output = tmp_path / "out" / "pairs.jsonl"
    prompts = ["a", "b", "c", "b", [{"role": "user", "content": "d"}]]
    assert label(prompts, answers, output, keys("x2sq"), quiet()) == 1
    expected = {"prompt": "a", "chosen": "second a", "rejected": "first a"}
    assert [json.loads(line) for line in output.read_text().splitlines()] == [expected]
    seen = []

    def ask(prompt, attempt):
        seen.append(prompt)
        return answers(prompt, attempt)

    assert label(prompts, ask, output, keys("1S1"), quiet()) == 2
    assert seen == ["b", "c", prompts[-1]]
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert [record["prompt"] for record in records] == ["a", "b", prompts[-1]]
    # What was written is what reward and dpo read.
    pairs = load_pairs(output, tiny_tokenizer(), 1000)
    assert len(pairs) == 3
    assert label(prompts, answers, output, keys(""), quiet()) == 0


def test_label_asks_again_for_answers_that_do_not_differ(tmp_path):
    attempts = []

    def answer(prompt, attempt):
        attempts.append((prompt, attempt))
        return ["same", "same "] if prompt == "a" or attempt < 2 else ["one", "two"]

    assert label(["a", "b"], answer, tmp_path / "o.jsonl", keys("1"), quiet()) == 1
    assert attempts == [("a", 0), ("a", 1), ("a", 2), ("a", 3), ("b", 0), ("b", 1), ("b", 2)]


def test_what_a_model_writes_is_shown_as_it_is(tmp_path):
    console = quiet()
    label(["[bold]p[/nope]"], lambda *_: ["[red]x[/red]", "y"], tmp_path / "o.jsonl", keys("q"), console)
    shown = console.file.getvalue()
    assert "[bold]p[/nope]" in shown and "[red]x[/red]" in shown


@pytest.mark.parametrize(
    ("content", "mended"),
    [
        (b'{"prompt": "a"}\n{"prompt": "b", "cho', b'{"prompt": "a"}\n'),
        (b'{"prompt": "a"}\n{"prompt": "b"}', b'{"prompt": "a"}\n{"prompt": "b"}\n'),
        (b'{"prom', b""),
        ('{"prompt": "é"}\n{"prompt": "'.encode() + "é".encode()[:1], '{"prompt": "é"}\n'.encode()),
        (b"", b""),
    ],
)
def test_a_line_cut_short_is_mended(tmp_path, content, mended):
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(content)
    mend(path)
    assert path.read_bytes() == mended
    append(path, {"prompt": "z"})
    assert path.read_bytes() == mended + b'{"prompt": "z"}\n'


def test_label_refuses_what_it_did_not_write(tmp_path):
    other = write(tmp_path / "sft.jsonl", {"instruction": "a", "output": "b"})
    with pytest.raises(ValueError, match="sft.jsonl:1: the output has a line without a prompt"):
        label(["a"], answers, other, keys("1"), quiet())
    with pytest.raises(ValueError, match="its name must end in .jsonl"):
        label(["a"], answers, tmp_path / "pairs.json", keys("1"), quiet())


def test_label_command_with_a_scripted_keyboard(tmp_path, model_dir):
    prompts = write(tmp_path / "prompts.txt", "say one", "say two", "say three")
    output = tmp_path / "pairs.jsonl"
    arguments = ("data", "label", "--model", model_dir, "--prompts-file", prompts, "--output", output)
    arguments += ("--max-new-tokens", 6)
    result = run(*arguments, stdin="1\nq\n")
    assert result.exit_code == 0, result.output
    assert "answer 1" in result.stdout and f"1 decisions added to {output}" in result.stdout
    first = json.loads(output.read_text())
    assert first["prompt"] == "say one" and first["chosen"] != first["rejected"]
    result = run(*arguments, stdin="s22")
    assert "1 prompts in" in result.stdout
    assert [json.loads(line)["prompt"] for line in output.read_text().splitlines()] == ["say one", "say three"]
    # What is sampled for a prompt does not depend on where a session started.
    again = run(*arguments[:-3], tmp_path / "again.jsonl", *arguments[-2:], stdin="1q")
    assert again.exit_code == 0, again.output
    assert json.loads((tmp_path / "again.jsonl").read_text()) == first
    result = run(*arguments, "--temperature", 0)
    assert result.exit_code == 2 and "--temperature must be > 0" in result.stderr


READS_KEYS = """
from lora_kernels.data.label import read_key
print("ready", flush=True)
keys = []
while (key := read_key()):
    keys.append(key)
print(keys, flush=True)
"""


def test_keys_of_a_terminal_need_no_enter():
    pty = pytest.importorskip("pty")
    ours, theirs = pty.openpty()
    command = [sys.executable, "-c", READS_KEYS]
    with subprocess.Popen(command, stdin=theirs, stdout=subprocess.PIPE, text=True, env=environment()) as process:
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.3)  # until it waits for a key: what is typed before, the terminal still takes as a line
        os.write(ours, b"1")
        time.sleep(0.3)
        os.write(ours, b"q\x04")
        assert process.stdout.readline() == "['1', 'q']\n"
    os.close(ours)
    os.close(theirs)


KILLED = """
import sys, json
from pathlib import Path
from lora_kernels.data.label import append
for i in range(10 ** 6):
    append(Path(sys.argv[1]), {"prompt": i, "text": "x" * 1000})
    print(i, flush=True)
"""


def test_a_killed_labeller_loses_no_line(tmp_path):
    output = tmp_path / "pairs.jsonl"
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, output], stdout=subprocess.PIPE, text=True, env=environment()
    ) as process:
        for line in process.stdout:
            if int(line) == 20:
                process.send_signal(signal.SIGKILL)
                break
        told = 20 + sum(1 for _ in process.stdout)
    mend(output)
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert [record["prompt"] for record in records] == list(range(len(records)))
    assert len(records) > told


def test_prompts_of_any_file(tmp_path):
    path = write(
        tmp_path / "mixed.jsonl",
        PAIR,
        {"prompt": "alone"},
        {"instruction": "do", "output": "done"},
        {
            "chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d",
            "rejected": "\n\nHuman: a\n\nAssistant: e",
        },
    )
    assert [prompt for prompt, _ in read_prompts(path)] == ["say one", "alone", "do", "a"]
    lines = read_prompts(write(tmp_path / "p.txt", "one", "", "two"))
    assert list(lines) == [("one", {"prompt": "one"}), ("two", {"prompt": "two"})]
    windows = tmp_path / "windows.txt"
    windows.write_bytes("\ufeffsay one\r\n\r\na\u2028b\r\n".encode())
    assert [prompt for prompt, _ in read_prompts(windows)] == ["say one", "a\u2028b"]
    windows.write_bytes(b"one\n\xe9\n")
    with pytest.raises(ValueError, match="windows.txt:2: not UTF-8"):
        list(read_prompts(windows))
    with pytest.raises(FileNotFoundError, match="absent.txt does not exist"):
        list(read_prompts(tmp_path / "absent.txt"))
    with pytest.raises(ValueError, match=r"p.csv: file names must end in one of .*\.txt"):
        list(read_prompts(write(tmp_path / "p.csv", "one,two")))


def test_records_without_an_answer_are_prompts(tmp_path):
    turns = [{"role": role, "content": text} for role, text in (("user", "a"), ("assistant", "b"), ("user", "c"))]
    records = [{"messages": turns[:1]}, {"instruction": "do"}, {"prompt": "p", "completion": None}]
    path = write(tmp_path / "prompts.jsonl", *records)
    assert [prompt for prompt, _ in read_prompts(path)] == ["a", "do", "p"]
    found = check_file(path, tiny_tokenizer())
    assert (found.kind, found.problems, len(found.lengths["prompt"])) == ("prompts", [], 3)
    found = check_file(write(tmp_path / "chats.jsonl", {"messages": turns[:1]}, {"messages": turns}))
    assert (found.kind, found.problems) == ("prompts", [])
    both = {"instruction": "i", "prompt": "p", "completion": "c"}
    path = write(tmp_path / "both.jsonl", both)
    assert [prompt for prompt, _ in read_prompts(path)] == ["p"] and check_file(path).kind == "sft"
    path = write(tmp_path / "turns.jsonl", {"messages": turns}, {"messages": turns[:2]})
    assert [prompt for prompt, _ in read_prompts(path)] == [turns, "a"]
    assert check_file(path).kind == "sft"
    found = check_file(write(tmp_path / "prompts.txt", "one", "", "two"))
    assert (found.kind, found.records, found.lengths) == ("prompts", 2, {"prompt": [3, 3]})
