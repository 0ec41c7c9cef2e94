"""Reading data files."""

import gzip
import json

import pytest
from tiny_chat import tiny_records, tiny_tokenizer

from lora_kernels.train.data import load_dataset
from lora_kernels.train.records import load_records


def test_every_file_format_gives_the_same_rows(tmp_path):
    import pyarrow
    import pyarrow.parquet

    records = tiny_records(5)
    lines = "\n".join(json.dumps(record) for record in records)
    (tmp_path / "a.jsonl").write_text("\ufeff" + lines.replace("\n", "\r\n\r\n") + "\n", encoding="utf-8")
    (tmp_path / "b.json").write_text(json.dumps(records, indent=2))
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "d.json").write_text(lines)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "e.parquet")
    for path in sorted(tmp_path.iterdir()):
        assert [record for record, _ in load_records(path)] == records, path
    dataset = load_dataset(tmp_path / "a.jsonl", tiny_tokenizer(), 256)
    assert len(dataset) == 5
    assert [where for _, where in load_records(tmp_path / "a.jsonl")][1].endswith("a.jsonl:3")
    assert [where for _, where in load_records(tmp_path / "b.json")][1].endswith("b.json:7: record 1")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"instruction": "a", "output": "b"}\n\n{"instruction": ', "a.jsonl:3: not JSON"),
        ("a.jsonl", '{"instruction": "a", "output": "b"}\n{"x": 1}\n', "a.jsonl:2: expected one of"),
        ("a.json", '[\n{"instruction": "a",\n "output": "b"},\n{"x": 1}]', "a.json:4: record 1: expected one of"),
        ("a.json", '[\n{"instruction": "a",\n "output": "b"},\n\n{"x" 1}]', "a.json:5: record 1: not JSON"),
        ("a.json", '[{"instruction": "a", "output": "b"}\n{}]', "a.json:2: expected ',' or ']' after record 0"),
        ("a.json", '[{"instruction": "a", "output": "b"}', "a.json:1: expected ',' or ']' after record 0, got the end"),
        ("a.json", '[{"instruction": "a", "output": "b"}]\n]', "a.json:2: text after"),
        ("a.json", "[]", "a.json: no records"),
        ("a.jsonl", "", "a.jsonl: no records"),
        ("a.txt", "", "must end in one of"),
        ("a.jsonl.gz", "not gzip", "a.jsonl.gz: can't be read"),
    ],
)
def test_bad_file(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        load_dataset(tmp_path / name, tiny_tokenizer(), 256)


def test_not_utf8_and_missing(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"a": 1}\n{"a": "\xff"}\n')
    with pytest.raises(ValueError, match="a.jsonl:2: not UTF-8"):
        list(load_records(tmp_path / "a.jsonl"))
    with pytest.raises(FileNotFoundError, match="gone.jsonl"):
        list(load_records(tmp_path / "gone.jsonl"))


def test_a_damaged_archive_is_named(tmp_path):
    path = tmp_path / "data.jsonl.gz"
    packed = bytearray(gzip.compress(json.dumps({"instruction": "a" * 500, "output": "b"}).encode()))
    packed[12:20] = b"\xff" * 8
    path.write_bytes(packed)
    with pytest.raises(ValueError, match="data.jsonl.gz: can't be read"):
        list(load_records(path))
