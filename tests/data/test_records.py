"""Reading data files: what a source names, what a file holds, what is said of damage, and the memory that it takes."""

import gzip
import json
import re
import tracemalloc
from pathlib import Path

import pytest
from tiny_chat import tiny_records, tiny_tokenizer

from lora_kernels.data import records as module
from lora_kernels.data.dataset import load_dataset
from lora_kernels.data.records import PROMPT_SUFFIXES, find_files, load_records

RECORDS = [
    {"instruction": "a\u2028b 😀", "output": "é" * 50, "n": [1, {"x": None}]},
    {"instruction": 'say "}"\n{', "output": "\\", "n": -1.5e-3},
    {"instruction": "c", "output": "", "n": True},
]


def dump(record, indent=None):
    return json.dumps(record, ensure_ascii=False, indent=indent)


def one_a_line(records):
    return "".join(dump(record) + "\n" for record in records)


# name -> (text, the line on which each record starts)
LAYOUTS = {
    "lines.jsonl": (one_a_line(RECORDS), [1, 2, 3]),
    "lines.json": (one_a_line(RECORDS), [1, 2, 3]),
    "blank lines and CRLF.jsonl": ("\r\n" + one_a_line(RECORDS).replace("\n", "\r\n\r\n"), [2, 4, 6]),
    "no newline at the end.jsonl": (one_a_line(RECORDS).strip(), [1, 2, 3]),
    "list.json": (dump(RECORDS), [1, 1, 1]),
    "list in jsonl.jsonl": (dump(RECORDS), [1, 1, 1]),
    "list with indentation.json": (dump(RECORDS, 1) + "\n", [2, 12, 17]),
    "data.json": (dump({"data": RECORDS}), [1, 1, 1]),
    "data among others.json": (dump({"v": '"\\', "n": {"x": 3}, "data": RECORDS, "x": {"y": []}}, 1), [7, 17, 22]),
    "over lines.json": ("".join(dump(record, 1) + "\n" for record in RECORDS), [1, 11, 16]),
    "over lines.jsonl": ("\n\n".join(dump(record, 1) for record in RECORDS), [1, 12, 18]),
    "no space between.json": ("".join(dump(record, 1) for record in RECORDS), [1, 10, 14]),
    "all in one line.jsonl": ("".join(dump(record) for record in RECORDS), [1, 1, 1]),
    "messages.json": ('{"messages": [\n{"role": "user"}\n]}\n', [1]),
}


@pytest.mark.parametrize("chunk", [64, module._CHUNK])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(tmp_path, monkeypatch, name, packed, mark, chunk):
    monkeypatch.setattr(module, "_CHUNK", chunk)
    text, lines = LAYOUTS[name]
    data = (mark + text).encode()
    path = tmp_path / (name + ".gz" * packed)
    path.write_bytes(gzip.compress(data) if packed else data)
    expected = RECORDS if len(lines) > 1 else [json.loads(text)]
    found = list(load_records(path))
    assert [record for record, _ in found] == expected
    assert [int(where.removeprefix(f"{path}:").split(":")[0]) for _, where in found] == lines


def test_one_record_over_lines(tmp_path):
    (tmp_path / "a.json").write_text(dump(RECORDS[0], 4), encoding="utf-8")
    assert list(load_records(tmp_path / "a.json")) == [(RECORDS[0], f"{tmp_path}/a.json:1: record 0")]


def test_a_list_under_another_name_than_data_is_a_field(tmp_path):
    path = tmp_path / "a.json"
    for record in ({"train": [{"a": 1}]}, {"data": ["text"]}, {"messages": [], "data": [{}]}, {"x": {"data": [{}]}}):
        path.write_text(dump(record))
        assert list(load_records(path)) == [(record, f"{path}:1")]


def test_parquet(tmp_path):
    import pyarrow
    import pyarrow.parquet

    records = [{"n": n, "messages": [{"role": "user", "content": str(n)}]} for n in range(module._PARQUET_ROWS + 3)]
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    assert list(load_records(path)) == [(record, f"{path}: record {n}") for n, record in enumerate(records)]
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match="a.parquet: can't be read"):
        list(load_records(path))


GOOD = '{"instruction": "a", "output": "b"}'
# name, text, what is said (of a file with a record a line, all of it), the lines of the records that are read
DAMAGE = [
    ("a.jsonl", f"{GOOD}\n\n" + '{"instruction": ', [":3: not JSON: Expecting value at column"], [1]),
    ("a.jsonl", f"{GOOD}\n{GOOD[:20]}\n{GOOD}\n", [":2: not JSON"], [1, 3]),
    ("a.jsonl", f"{GOOD[:20]}\n{GOOD}\n{GOOD}\n", [":1: not JSON"], [2, 3]),
    ("a.jsonl", '{"instruction": ' + f"\n{GOOD}\n{GOOD}\n", [":1: not JSON"], [2, 3]),
    ("a.jsonl", '{"instruction": \n', [":1: not JSON"], []),
    ("a.jsonl", f"oh\n{GOOD}x\n{GOOD}\n{GOOD},\n", [":1: not JSON", ":2: not JSON: Extra", ":4: not JSON: Extra"], [3]),
    ("a.jsonl", '{"a": ' + "[" * 100_000 + f"\n{GOOD}", [":1: not JSON: nested too deeply"], [2]),
    ("a.jsonl", f"{GOOD}\n" + '{"a": ' + "1" * 5000 + "}\n", [":2: not JSON: Exceeds the limit"], [1]),
    ("a.jsonl", f'{GOOD}\n{{"a": "\udcff"}}\n{GOOD}', [":2: not UTF-8: invalid start byte"], [1, 3]),
    ("a.jsonl", f'{{"a": "\udcff"}}\n{GOOD}', [":1: not UTF-8: invalid start byte"], [2]),
    ("a.json", f'[\n{GOOD},\n\n{{"x" 1}}]', [":4: record 1: not JSON: Expecting ':'"], [2]),
    ("a.json", f'[\n{GOOD},\n{{"x": 1,\n"y" 2}}]', [":4: record 1, which starts in line 3: not JSON"], [2]),
    ("a.json", f'[{GOOD},\n{{"x": "\udcff"}}]', [":2: not UTF-8: invalid start byte"], [1]),
    ("a.json", f"[{GOOD},\n\udce2", [":2: not UTF-8: unexpected end of data"], [1]),
    ("a.json", f"[{GOOD}\n{GOOD}]", [":2: expected ',' or ']' after record 0, got '{'"], [1]),
    ("a.json", f"[{GOOD}", [":1: expected ',' or ']' after record 0, got the end"], [1]),
    ("a.json", f"[{GOOD}]\n]", [":2: text after the end of the list"], [1]),
    ("a.json", f'{{"data": [{GOOD}\n{GOOD}]}}', [":2: expected ',' or ']' after record 0, got '{'"], [1]),
    ("a.json", f'{{"data": [\n{GOOD}]\n', [":3: expected ',' or '}' after the list, got the end"], [2]),
    ("a.json", f'{{"data": [\n{GOOD}], "x"\n}}', [":3: expected ':' after a name, got '}'"], [2]),
    ("a.json", f'{{"data": [\n{GOOD}]}}\n{GOOD}', [":3: text after the end"], [2]),
    ("a.json", '{\n"a": 1\n}\n{\n"a": 2,\n"b" 3\n}\n', [":6: record 1, which starts in line 4: not JSON"], [1]),
    ("a.json", '{\n"a": 1,\n"b" 2\n}\n{\n"a": 2\n}\n', [":3: record 0, which starts in line 1: not JSON"], []),
    ("a.json", '{\n"a": "\udcff"}\n', [":2: not UTF-8: invalid start byte"], []),
    ("a.txt", "one\n\udcff\ntwo\n", [":2: not UTF-8: invalid start byte"], [1, 3]),
]


@pytest.mark.parametrize("chunk", [64, module._CHUNK])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("name", "text", "problems", "lines"), DAMAGE)
def test_damage_is_named_and_what_can_be_read_is_read(
    tmp_path, monkeypatch, name, text, problems, lines, packed, chunk
):
    monkeypatch.setattr(module, "_CHUNK", chunk)
    data = text.encode("utf-8", "surrogateescape")
    path = tmp_path / (name + ".gz" * packed)
    path.write_bytes(gzip.compress(data) if packed else data)
    said = []
    read = [where for _, where in load_records(path, said, PROMPT_SUFFIXES)]
    assert [int(where.removeprefix(f"{path}:").split(":")[0]) for where in read] == lines
    assert len(said) == len(problems)
    for found, expected in zip(said, problems, strict=True):
        assert found.startswith(f"{path}{expected}")
    with pytest.raises(ValueError, match=f"^{re.escape(said[0])}$"):
        list(load_records(path, suffixes=PROMPT_SUFFIXES))


@pytest.mark.parametrize("keep", [slice(0, -3), slice(0, 30), slice(30, None)])
def test_a_damaged_archive_is_named(tmp_path, keep):
    path = tmp_path / "data.jsonl.gz"
    path.write_bytes(gzip.compress(one_a_line(RECORDS).encode())[keep])
    with pytest.raises(ValueError, match="data.jsonl.gz: can't be read"):
        list(load_records(path))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", f'{GOOD}\n{{"x": 1}}\n', "a.jsonl:2: expected one of"),
        ("a.json", f'[\n{GOOD},\n{{"x": 1}}]', "a.json:3: record 1: expected one of"),
        ("a.json", "[]", "a.json: no records"),
        ("a.json", '{"data": []}', "a.json: no records"),
        ("a.jsonl", "", "a.jsonl: no records"),
        ("a.txt", "", "must end in one of"),
        ("a.arrow", "", "must end in one of"),
    ],
)
def test_bad_data_set(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        load_dataset(tmp_path / name, tiny_tokenizer(), 256)


def texts(records, name):
    """A text of each layout, many times as long as what should be held of it."""
    return {
        "lines": one_a_line(records),
        "list": dump(records),
        "data": dump({"data": records}),
        "over lines": "".join(dump(record, 1) + "\n" for record in records),
        "one line": "".join(dump(record) for record in records),
    }[name]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("layout", ["lines", "list", "data", "over lines", "one line"])
def test_memory_does_not_grow_with_the_file(tmp_path, layout, packed):
    path = tmp_path / ("a.json" + ".gz" * packed)
    data = texts([{"text": f"{number} 😀 " * 120} for number in range(4000)], layout).encode()
    path.write_bytes(gzip.compress(data, 1) if packed else data)
    assert len(data) > 4 << 20
    tracemalloc.start()
    try:
        assert sum(1 for _ in load_records(path)) == 4000
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Files whose only record says their name."""
    monkeypatch.chdir(tmp_path)
    for name in (
        *("d/b.jsonl", "d/a.json", "d/.hidden.jsonl", "d/readme.md", "d/notes.txt", "d/sub/c.jsonl", "d/.cache/x.json"),
        *("a,b.jsonl", "what[1]?.jsonl", "comma,dir/e.jsonl", "empty/readme.md", "hf/data-00000-of-00001.arrow"),
        *("hf/state.json", "plain.jsonl"),
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(dump({"name": name}))
    return tmp_path


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("plain.jsonl", ["plain.jsonl"]),
        ("d/b.jsonl,d/a.json", ["d/b.jsonl", "d/a.json"]),
        ("d/b.jsonl , plain.jsonl", ["d/b.jsonl", "plain.jsonl"]),
        (["d/b.jsonl", "d/a.json", "d/b.jsonl"], ["d/b.jsonl", "d/a.json", "d/b.jsonl"]),
        ("d", ["d/a.json", "d/b.jsonl", "d/sub/c.jsonl"]),
        ("d/", ["d/a.json", "d/b.jsonl", "d/sub/c.jsonl"]),
        ("d/*.json*", ["d/a.json", "d/b.jsonl"]),
        ("d/**/*.jsonl", ["d/b.jsonl", "d/sub/c.jsonl"]),
        ("d/s*/*", ["d/sub/c.jsonl"]),
        ("d/?.json,plain.jsonl", ["d/a.json", "plain.jsonl"]),
        (["d/sub", "plain.jsonl,d/a.json"], ["d/sub/c.jsonl", "plain.jsonl", "d/a.json"]),
        ("a,b.jsonl", ["a,b.jsonl"]),
        ("what[1]?.jsonl", ["what[1]?.jsonl"]),
        ("comma,dir", ["comma,dir/e.jsonl"]),
        ("~/plain.jsonl,~/d/a.json", ["plain.jsonl", "d/a.json"]),
    ],
)
def test_what_a_source_names(folder, monkeypatch, source, expected):
    monkeypatch.setenv("HOME", str(folder))
    assert [record["name"] for record, _ in load_records(source)] == expected


def test_paths_and_places(folder):
    found = list(load_records([folder / "d", folder / "plain.jsonl"]))
    names = ["d/a.json", "d/b.jsonl", "d/sub/c.jsonl", "plain.jsonl"]
    assert [where for _, where in found] == [f"{folder / name}:1" for name in names]


def test_texts_are_for_prompts_and_not_those_beside_records(folder):
    assert find_files("d/notes.txt", PROMPT_SUFFIXES) == find_files("d/*.txt", PROMPT_SUFFIXES) == [Path("d/notes.txt")]
    assert find_files("d", PROMPT_SUFFIXES) == find_files("d")
    (folder / "empty" / "prompts.txt").write_text("one")
    assert find_files("empty", PROMPT_SUFFIXES) == [Path("empty/prompts.txt")]
    with pytest.raises(FileNotFoundError, match="directory empty has no data file"):
        find_files("empty")


@pytest.mark.parametrize(
    ("source", "kind", "message"),
    [
        ("gone.jsonl", FileNotFoundError, "^data file gone.jsonl does not exist$"),
        ("d/a.json,gone.jsonl", FileNotFoundError, "^data file gone.jsonl does not exist, of 'd/a.json,gone.jsonl'$"),
        ("gone/*.jsonl", FileNotFoundError, r"^no file matches gone/\*.jsonl$"),
        ("d/su*", FileNotFoundError, r"^no file matches d/su\*$"),
        ("empty", FileNotFoundError, r"^directory empty has no data file: names must end in one of \.json, .*dot$"),
        ("d/*", ValueError, r"^d/notes.txt: file names must end in one of \.json, "),
        ("d/readme.md", ValueError, r"^d/readme.md: file names must end in one of \.json, "),
        ("hf", ValueError, r"^hf/data-00000-of-00001.arrow: names must end in one of .*to_parquet"),
        ("plain.jsonl,", ValueError, "^a data file without a name, in 'plain.jsonl,'$"),
        ("", ValueError, "^a data file without a name, in ''$"),
        ([], ValueError, "^the list of data files is empty$"),
    ],
)
def test_bad_sources(folder, source, kind, message):
    with pytest.raises(kind, match=message):
        list(load_records(source))


def test_a_file_that_can_not_be_opened_is_no_file_less(folder):
    (folder / "d" / "lost.jsonl").symlink_to(folder / "gone")
    with pytest.raises(ValueError, match="d/lost.jsonl: can't be read"):
        list(load_records("d"))


def test_many_files_are_the_same_data_as_one(tmp_path):
    records = tiny_records(6)
    (tmp_path / "one.jsonl").write_text(one_a_line(records))
    (tmp_path / "many").mkdir()
    for number in range(3):
        (tmp_path / "many" / f"{number}.jsonl").write_text(one_a_line(records[2 * number : 2 * number + 2]))
    tokenizer = tiny_tokenizer()
    expected = load_dataset(tmp_path / "one.jsonl", tokenizer, 256).digest()
    parts = [tmp_path / "many" / f"{number}.jsonl" for number in range(3)]
    for source in (tmp_path / "many", tmp_path / "many" / "*", parts, ",".join(map(str, parts))):
        assert load_dataset(source, tokenizer, 256).digest() == expected
    assert load_dataset(parts[::-1], tokenizer, 256).digest() != expected
