import numpy as np
import pytest
import torch
from tiny_chat import CHATML, tiny_tokenizer

from lora_kernels.data.chat import set_chat_template
from lora_kernels.data.dataset import build_dataset
from lora_kernels.data.messages import to_conversation


def dataset_of(*records, tokenizer=None, max_length=256):
    numbered = [(record, f"data:{number}") for number, record in enumerate(records, start=1)]
    return build_dataset(numbered, tokenizer or tiny_tokenizer(), max_length, "data")


def learned_text(dataset, tokenizer, row=0):
    return tokenizer.decode(dataset.input_ids[row][dataset.answer_mask[row]])


def chat(*contents, system=None):
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
    return {"messages": ([{"role": "system", "content": system}] if system else []) + messages}


def test_the_answer_and_its_end_token_are_learned_and_nothing_else():
    tokenizer = tiny_tokenizer()
    dataset = dataset_of({"instruction": "the cat", "input": "one two", "output": "says red"})
    text = "<|im_start|>user\nthe cat\n\none two<|im_end|>\n<|im_start|>assistant\nsays red<|im_end|>"
    assert tokenizer.decode(dataset.input_ids[0]) == text
    assert learned_text(dataset, tokenizer) == "says red<|im_end|>"
    assert dataset.input_ids[0][-1] == tokenizer.eos_token_id
    prompt = [{"role": "user", "content": "the cat\n\none two"}]
    generated_from = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
    assert dataset.input_ids[0][~dataset.answer_mask[0]].tolist() == generated_from


def test_every_assistant_turn_is_learned():
    tokenizer = tiny_tokenizer()
    dataset = dataset_of(chat("red", "one", "blue", "two apple", "left over", system="the dog"))
    assert learned_text(dataset, tokenizer) == "one<|im_end|>two apple<|im_end|>"
    assert "left over" not in tokenizer.decode(dataset.input_ids[0])


def test_of_prompt_and_completion_only_the_completion_is_learned():
    tokenizer = tiny_tokenizer()
    strings = {"prompt": "red", "completion": "one"}
    prompt = chat("red", "one", "blue")["messages"]
    lists = {"prompt": prompt, "completion": [{"role": "assistant", "content": "two"}]}
    mixed = {"prompt": prompt, "completion": "two"}
    dataset = dataset_of(strings, lists, mixed)
    learned = [learned_text(dataset, tokenizer, row) for row in range(3)]
    assert learned == ["one<|im_end|>", "two<|im_end|>", "two<|im_end|>"]
    assert dataset.input_ids[1].tolist() == dataset.input_ids[2].tolist()


def test_pad_equal_to_eos():
    tokenizer = tiny_tokenizer(pad_is_eos=True)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    dataset = dataset_of(chat("red", "one"), chat("blue", "two apple pear plum"), tokenizer=tokenizer)
    batch = dataset.batch([0, 1])
    length = len(dataset.input_ids[0])
    assert batch["input_ids"].shape == (2, len(dataset.input_ids[1]))
    assert batch["attention_mask"].sum(1).tolist() == dataset.lengths.tolist()
    assert batch["labels"][0, length - 1] == tokenizer.eos_token_id
    assert (batch["labels"][0, length:] == -100).all()
    assert (batch["labels"] != -100).sum(1).tolist() == dataset.loss_counts.tolist()
    learned = batch["labels"] != -100
    assert torch.equal(batch["labels"][learned], batch["input_ids"][learned])


def test_default_template_without_a_chat_template():
    tokenizer = tiny_tokenizer(chat_template=None)
    dataset = dataset_of(chat("the cat", "red", system="one"), tokenizer=tokenizer)
    assert tokenizer.decode(dataset.input_ids[0]) == "one\n\n### Instruction:\nthe cat\n\n### Response:\nred<|im_end|>"
    assert learned_text(dataset, tokenizer) == "red<|im_end|>"
    tokenizer = tiny_tokenizer(chat_template=None)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="chat_template"):
        set_chat_template(tokenizer)


def test_template_from_text_or_file(tmp_path):
    tokenizer = tiny_tokenizer(chat_template=None)
    (tmp_path / "template.jinja").write_text(CHATML)
    set_chat_template(tokenizer, str(tmp_path / "template.jinja"))
    assert tokenizer.chat_template == CHATML
    with pytest.raises(FileNotFoundError, match="nowhere"):
        set_chat_template(tokenizer, "nowhere.jinja")


def test_template_without_end_token_gets_one():
    template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}"
    template += "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    tokenizer = tiny_tokenizer(chat_template=template)
    dataset = dataset_of(chat("cat", "red"), tokenizer=tokenizer)
    assert learned_text(dataset, tokenizer) == " red\n<|im_end|>"


def test_a_token_over_the_border_is_split_as_it_would_be_in_use():
    tokenizer = tiny_tokenizer()
    assert len(tokenizer("\n\n")["input_ids"]) == 1
    dataset = dataset_of(chat("cat", "\nred"))
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "cat"}], add_generation_prompt=True, return_dict=False
    )
    assert dataset.input_ids[0][: len(prompt)].tolist() == prompt
    assert learned_text(dataset, tokenizer) == "\nred<|im_end|>"


def test_template_that_shows_only_the_last_turn_whole():
    """As templates of reasoning models do: the last answer gets a prefix, which earlier ones lose."""
    prefix = "('<think></think>' if loop.last and message['role'] == 'assistant' else '') + "
    template = CHATML.replace("message['content']", prefix + "message['content']")
    assert template != CHATML
    tokenizer = tiny_tokenizer(chat_template=template)
    dataset = dataset_of(chat("red", "one", "blue", "two"), tokenizer=tokenizer)
    assert learned_text(dataset, tokenizer) == "one<|im_end|><think></think>two<|im_end|>"


def test_template_that_refuses_a_chat():
    tokenizer = tiny_tokenizer(chat_template="{{ raise_exception('no system here') }}")
    with pytest.raises(ValueError, match="data:1: .*no system here"):
        dataset_of(chat("red", "one"), tokenizer=tokenizer)


def test_truncation_keeps_the_start_and_drops_rows_without_answer():
    long_prompt, long_answer = chat("cat " * 40, "red"), chat("cat", "red " * 40)
    with pytest.warns(UserWarning, match="dropped 1 rows that have no answer token among their first 30"):
        dataset = dataset_of(long_prompt, long_answer, chat("cat", "dog"), max_length=30)
    assert (len(dataset), dataset.truncated, dataset.dropped) == (2, 1, 1)
    assert dataset.lengths.max() == 30
    whole = dataset_of(long_answer)
    assert np.array_equal(dataset.input_ids[0], whole.input_ids[0][:30])
    assert "1 rows truncated; 1 rows dropped" in dataset.describe()
    with pytest.warns(UserWarning, match="dropped 1"), pytest.raises(ValueError, match="no row with an answer"):
        dataset_of(long_prompt, max_length=30)


def test_blank_answers_are_dropped_and_counted():
    with pytest.warns(UserWarning, match="dropped 2 rows whose answer is blank"):
        dataset = dataset_of(chat("cat", ""), chat("cat", " \n"), chat("cat", "dog"))
    assert len(dataset) == 1


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ([1], "expected an object, got list"),
        ({"text": "a"}, "expected one of .*got the fields 'text'"),
        ({"instruction": "a", "output": None}, "'output' must be a string, got NoneType"),
        ({"instruction": "a", "input": 3, "output": "b"}, "'input' must be a string, got int"),
        ({"messages": "hello"}, "'messages' must be a non-empty list"),
        ({"messages": [{"role": "user"}]}, r"messages\[0\] must be"),
        ({"messages": [{"role": "user", "content": [1]}]}, r"messages\[0\]: 'content' must be a string, got list"),
        ({"messages": [{"role": "user", "content": "a"}]}, "no assistant message"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "first message"),
        ({"prompt": "a", "completion": 1}, "'completion' must be a non-empty list"),
    ],
)
def test_bad_record(record, message):
    with pytest.raises(ValueError, match=f"^file.jsonl:7: .*{message}"):
        to_conversation(record, "file.jsonl:7")


def test_half_a_character_is_named():
    with pytest.raises(ValueError, match=r"data:1: 'instruction' holds '\\ud83d', half of a character, at 4"):
        dataset_of({"instruction": "say \ud83d", "output": "one"})


def test_a_digest_tells_data_apart():
    records = [chat("red", "one"), chat("blue", "two apple")]
    digests = {dataset_of(*some).digest() for some in (records, records[::-1], records[:1], [*records, records[0]])}
    assert len(digests) == 4 and dataset_of(*records).digest() in digests
