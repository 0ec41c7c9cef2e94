"""Preference records in the forms that are around, and the pairs that are made of them."""

import gzip
import json

import numpy as np
import pytest
from places import ROOT
from tiny_chat import tiny_tokenizer

from lora_kernels.data.pairs import build_pairs, load_pairs, to_pair

DATA = ROOT.parent / "shared" / "data"


def turn(role, content):
    return {"role": role, "content": content}


ASKED = [turn("user", "say one")]
FORMS = {
    "strings": {"prompt": "say one", "chosen": "one", "rejected": "two"},
    "messages": {"prompt": ASKED, "chosen": [turn("assistant", "one")], "rejected": [turn("assistant", "two")]},
    "one message": {"prompt": "say one", "chosen": turn("assistant", "one"), "rejected": turn("assistant", "two")},
    "answers with the prompt": {
        "prompt": "say one",
        "chosen": [*ASKED, turn("assistant", "one")],
        "rejected": [*ASKED, turn("assistant", "two")],
    },
    "whole conversations": {
        "chosen": [*ASKED, turn("assistant", "one")],
        "rejected": [*ASKED, turn("assistant", "two")],
    },
    "LLaMA-Factory": {
        "conversations": [{"from": "human", "value": "say one"}],
        "chosen": {"from": "gpt", "value": "one"},
        "rejected": {"from": "gpt", "value": "two"},
    },
    "hh-rlhf": {
        "chosen": "\n\nHuman: say one\n\nAssistant: one",
        "rejected": "\n\nHuman: say one\n\nAssistant: two",
    },
    "instruction": {"instruction": "say one", "input": "", "chosen": "one", "rejected": "two"},
}


@pytest.mark.parametrize("form", FORMS)
def test_forms(form):
    pair = to_pair(FORMS[form], "f:1")
    assert pair.prompt == ASKED
    assert pair.chosen.messages == [*ASKED, turn("assistant", "one")]
    assert pair.rejected.messages == [*ASKED, turn("assistant", "two")]
    assert pair.chosen.answers == pair.rejected.answers == (1,)
    assert pair.margin == 0


def test_turns_before_the_answers_and_after_them():
    shared = "\n\nHuman: one?\n\nAssistant: two.\n\nHuman: three?"
    record = {"chosen": f"{shared}\n\nAssistant: four", "rejected": f"{shared}\n\nAssistant: five\n\nHuman: ?"}
    pair = to_pair(record, "f")
    assert [item["content"] for item in pair.prompt] == ["one?", "two.", "three?"]
    assert pair.rejected.messages[-1] == turn("assistant", "five")
    assert pair.chosen.answers == (3,)
    longer = [*ASKED, turn("assistant", "one"), turn("user", "more"), turn("assistant", "two")]
    pair = to_pair({"chosen": longer[:2], "rejected": longer}, "f")
    assert (pair.prompt, pair.chosen.answers, pair.rejected.answers) == (ASKED, (1,), (1, 3))
    pair = to_pair({**FORMS["strings"], "system": "be brief", "margin": 2}, "f")
    assert pair.prompt == [turn("system", "be brief"), *ASKED]
    assert pair.margin == 2


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("text", "f:7: expected one of .*; got the fields str"),
        ({"prompt": "p", "chosen": "c"}, "f:7: expected one of .*; got the fields 'prompt', 'chosen'"),
        ({"prompt": "p", "chosen": "c", "rejected": 3}, "f:7: 'rejected' must be a non-empty list of messages, got 3"),
        ({"prompt": [], "chosen": "c", "rejected": "d"}, "f:7: 'prompt' must be a non-empty list"),
        ({"prompt": "p", "chosen": "c", "rejected": "d", "margin": "1"}, "'margin' must be a finite number, got '1'"),
        ({"prompt": "p", "chosen": "c", "rejected": "d", "margin": float("nan")}, "'margin' must be a finite number"),
        ({"chosen": "c", "rejected": "d"}, "f:7: without a 'prompt', 'chosen' must be a list of messages or a text"),
        ({"chosen": [turn("user", "a")], "rejected": [turn("user", "b")]}, "have no first message in common"),
        ({"chosen": [*ASKED, turn("user", "a")], "rejected": [*ASKED, turn("user", "b")]}, "chosen must go on with an"),
        ({"prompt": ASKED, "chosen": ASKED, "rejected": "two"}, "chosen must go on with an .*; it is missing"),
        ({"prompt": [turn("assistant", "a")], "chosen": "c", "rejected": "d"}, "must not be the assistant's"),
        (
            {"conversations": [{"from": "human"}], "chosen": "c", "rejected": "d"},
            r"f:7: conversations\[0\] must be \{\"role\", \"content\"\}",
        ),
    ],
)
def test_bad_records(record, message):
    with pytest.raises(ValueError, match=message):
        to_pair(record, "f:7")


def test_tokens_and_masks_are_those_of_sft():
    from lora_kernels.data.dataset import build_dataset

    tokenizer = tiny_tokenizer()
    records = [(FORMS["strings"], "f:1"), ({"prompt": "the cat", "chosen": "dog", "rejected": "a red bird"}, "f:2")]
    pairs = build_pairs(records, tokenizer, 64, "f")
    for side in ("chosen", "rejected"):
        as_sft = [({"prompt": record["prompt"], "completion": record[side]}, where) for record, where in records]
        sft = build_dataset(as_sft, tokenizer, 64, "f")
        for (ids, mask), expected_ids, expected_mask in zip(
            getattr(pairs, side), sft.input_ids, sft.answer_mask, strict=True
        ):
            assert np.array_equal(ids, expected_ids)
            assert np.array_equal(mask, expected_mask)
    learned = pairs.rejected[1][0][pairs.rejected[1][1]]
    assert tokenizer.decode(learned) == "a red bird<|im_end|>"


def test_batch_and_lengths():
    tokenizer = tiny_tokenizer(pad_is_eos=True)
    records = [
        ({"prompt": "say", "chosen": "one", "rejected": "two two two", "margin": 1.5}, "f:1"),
        ({"prompt": "the cat says", "chosen": "one", "rejected": "two"}, "f:2"),
    ]
    pairs = build_pairs(records, tokenizer, 64, "f")
    assert pairs.loss_counts.tolist() == [1, 1]
    batch = pairs.batch([1, 0])
    rows = [pairs.chosen[1], pairs.chosen[0], pairs.rejected[1], pairs.rejected[0]]
    assert batch["lengths"].tolist() == [len(ids) for ids, _ in rows]
    assert batch["margin"].tolist() == [0, 1.5]
    assert "ref_logprobs" not in batch
    for row, (ids, mask) in enumerate(rows):
        assert batch["input_ids"][row, : len(ids)].tolist() == ids.tolist()
        assert (batch["labels"][row] != -100).sum() == mask.sum()
        # The end token is learned although it is the pad token.
        assert batch["labels"][row, len(ids) - 1] == tokenizer.eos_token_id
    assert pairs.lengths.tolist() == [len(pairs.chosen[i][0]) + len(pairs.rejected[i][0]) for i in range(2)]
    pairs.ref_logprobs = np.array([[1, 2], [3, 4]], dtype=np.float32)
    assert pairs.batch([1, 0])["ref_logprobs"].tolist() == [3, 1, 4, 2]


def test_long_and_blank_pairs_are_dropped_and_counted(tmp_path):
    tokenizer = tiny_tokenizer()
    records = [
        {"prompt": "say", "chosen": "one", "rejected": "one " * 40},
        FORMS["strings"],
        {"prompt": "say", "chosen": " ", "rejected": "one"},
        {"prompt": "p", "chosen": "c", "rejected": " c\n"},
    ]
    path = tmp_path / "pairs.jsonl.gz"
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, records)).encode()))
    with pytest.warns(UserWarning, match="dropped") as warned:
        pairs = load_pairs(path, tokenizer, 40)
    texts = [str(warning.message) for warning in warned]
    assert f"{path}: dropped 1 pairs with more than 40 tokens (max_length) in prompt and answer" in texts
    assert f"{path}: dropped 2 pairs with a blank answer or two equal ones" in texts
    assert (len(pairs), pairs.too_long, pairs.void) == (1, 1, 2)
    assert pairs.longest == max(len(pairs.chosen[0][0]), len(pairs.rejected[0][0])) < pairs.lengths[0]
    described = "1 pairs longer than max_length dropped; 2 pairs with a blank answer or two equal ones dropped"
    assert pairs.describe().endswith(described)
    with pytest.raises(ValueError, match="no pair is left"), pytest.warns(UserWarning, match="dropped 1 pairs"):
        build_pairs([(records[0], "f")], tokenizer, 40, "f")
    with pytest.raises(ValueError, match="no records"):
        build_pairs([], tokenizer, 40, "f")


def test_parquet(tmp_path):
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "pairs.parquet"
    rows = [FORMS["whole conversations"], FORMS["whole conversations"]]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    assert len(load_pairs(path, tiny_tokenizer(), 64)) == 2


@pytest.mark.skipif(not DATA.is_dir(), reason="the real preference files aren't here")
@pytest.mark.parametrize("name", ["lf_dpo_en_demo.json", "lf_dpo_zh_demo.json", "pref_gsm8k_pairs.jsonl"])
def test_real_files(name):
    from lora_kernels.data.records import load_records

    pairs = [to_pair(record, where) for record, where in load_records(DATA / name)]
    assert len(pairs) == (300 if "lf" in name else 967)
    assert all(pair.chosen.answers == (len(pair.prompt),) for pair in pairs)
