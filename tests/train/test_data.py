import pytest
import torch

from efftune import EfftuneError
from efftune.train import data
from efftune.train.data import IGNORED, encode_labelled, encode_lm, label_names, read_table, split

CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def counted(example, tokenizer):
    return tokenizer.decode([label for label in example.labels if label != IGNORED])


@pytest.mark.parametrize(
    "name, content, layout, first",
    [
        ("a.jsonl", '{"prompt": "p", "completion": "c"}\n\n{"prompt": "q", "completion": "d"}\n', "prompt", ["p", "c"]),
        ("a.json", '[{"question": "p", "answer": "c"}, {"question": "x", "answer": "y"}]', "question", ["p", "c"]),
        ("a.txt", "one\n\ntwo\n", "text", ["one\n\ntwo\n"]),
        ("a.csv", 'Text,Label\n"a, b",1\nnull,0\n', "label", ["a, b", 1]),
        ("a.csv", "prompt,completion,other\np,c,1\n", "prompt", ["p", "c"]),
        ("a.tsv", 'a "lone quote\t1\nb\t0\nc\t1\n', "label", ['a "lone quote', 1]),
        ("a.tsv", "sentence\tlabel\nb\tgood\nc\tbad\n", "label", ["b", "good"]),
        ("a.jsonl", '{"text": "null"}\n', "text", ["null"]),
    ],
)
def test_layouts_are_recognised_by_their_columns(write, name, content, layout, first):
    table = read_table(write(name, content))
    assert (table.layout, next(iter(table))) == (layout, first)


def test_parquet_is_read(tmp_path):
    import datasets

    path = tmp_path / "a.parquet"
    datasets.Dataset.from_dict({"text": ["x", "y"], "label": [0, 1]}).to_parquet(path)
    table = read_table(path)
    assert table.layout == "label" and list(table) == [["x", 0], ["y", 1]]


@pytest.mark.parametrize(
    "name, content, sentence",
    [
        ("missing.jsonl", None, "does not exist"),
        ("a.xlsx", "x", "convert it to one of"),
        ("a.jsonl", "\n\n", "is empty"),
        ("a.jsonl", '{"text": "a"}\n\n{"text": "b"\n', "malformed at line 3"),
        ("a.jsonl", '{"text": "a"}\n["b"]\n', "malformed at line 2"),
        ("a.tsv", "a\t1\nb\t0\nc\n", "malformed at line 3: 1 fields where the first line has 2"),
        ("a.csv", "text,label\na,1\nb,1,2\n", "malformed at line 3"),
        ("a.jsonl", '{"body": "a", "title": "b"}\n', "has the columns body, title; rename them to one of prompt"),
        ("a.csv", "foo,bar\na,1\nb,0\n", "has the columns foo, bar"),
        ("a.csv", "review,sentiment\na,pos\nb,neg\nc,pos\nd,neg\ne,pos\nf,neg\n", "has the columns review, sentiment"),
        ("a.parquet", "no parquet", "is not a readable parquet file"),
    ],
)
def test_files_that_cannot_be_read(write, tmp_path, name, content, sentence):
    path = tmp_path / name if content is None else write(name, content)
    with pytest.raises(EfftuneError, match=sentence):
        read_table(path)


def test_an_empty_cell_is_refused_with_its_row(write, tokenizer):
    path = write("a.jsonl", [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": None}])
    with pytest.raises(EfftuneError, match="row 2 has nothing in column 'completion'"):
        encode_lm(read_table(path), tokenizer, 64, "error")


def test_only_completions_and_answers_count(write, tokenizer):
    path = write("a.jsonl", [{"prompt": "the cat", "completion": " sat on the mat"}])
    (example,) = encode_lm(read_table(path), tokenizer, 64, "error")
    assert counted(example, tokenizer) == " sat on the mat<end>"
    assert tokenizer.decode(example.input_ids) == "the cat sat on the mat<end>"
    path = write("b.jsonl", [{"question": "one and two", "answer": "three"}])
    (example,) = encode_lm(read_table(path), tokenizer, 64, "error")
    assert counted(example, tokenizer) == " three<end>"
    assert tokenizer.decode(example.input_ids) == "Question: one and two\nAnswer: three<end>"


def test_only_the_assistant_counts_in_a_chat(write, tokenizer):
    turns = ["user", "the cat"], ["assistant", "sat"], ["user", "and"], ["assistant", "slept"]
    path = write("a.jsonl", [{"messages": [{"role": r, "content": c} for r, c in turns]}])
    with pytest.raises(EfftuneError, match="no chat template"):
        encode_lm(read_table(path), tokenizer, 64, "error")
    tokenizer.chat_template = CHAT
    try:
        (example,) = encode_lm(read_table(path), tokenizer, 64, "error")
        assert counted(example, tokenizer) == "sat\nslept\n"
        tokenizer.chat_template = CHAT.replace("{{ m.content }}", "{{ m.content if loop.last else '-' }}")
        with pytest.raises(EfftuneError, match="rewrites earlier turns"):
            encode_lm(read_table(path), tokenizer, 64, "error")
        tokenizer.chat_template = "{{ raise_exception('only two turns') }}"
        with pytest.raises(EfftuneError, match=r"a.jsonl: row 1: .*chat template refuses .*only two turns"):
            encode_lm(read_table(path), tokenizer, 64, "error")
        tokenizer.chat_template = CHAT
        bad = write("b.jsonl", [{"messages": [{"from": "user", "content": "x"}]}])
        with pytest.raises(EfftuneError, match="'role' and 'content'"):
            encode_lm(read_table(bad), tokenizer, 64, "error")
    finally:
        tokenizer.chat_template = None


def test_text_is_cut_into_windows_that_lose_nothing(write, tokenizer):
    path = write("a.txt", "the cat sat on the mat and " * 20)
    made = encode_lm(read_table(path), tokenizer, 16, "error")
    assert sum((e.input_ids for e in made), []) == [*tokenizer(path.read_text())["input_ids"], 0]
    assert max(len(e.input_ids) for e in made) == 16 and [e.sample_id for e in made] == list(range(len(made)))
    assert all(e.labels[0] == IGNORED for e in made)


def test_long_examples(write, tokenizer):
    path = write("a.jsonl", [{"prompt": "the cat", "completion": " dog" * 40}, {"prompt": "a", "completion": " dog"}])
    with pytest.raises(EfftuneError, match="row 1 has .* tokens and a row holds 16; raise --seq-len"):
        encode_lm(read_table(path), tokenizer, 16, "error")
    assert [len(e.input_ids) for e in encode_lm(read_table(path), tokenizer, 16, "truncate")][0] == 16
    assert [e.sample_id for e in encode_lm(read_table(path), tokenizer, 16, "drop")] == [1]
    with pytest.raises(EfftuneError, match="leaves no example"):
        encode_lm(read_table(path), tokenizer, 2, "drop")


def test_labels(write, tokenizer):
    table = read_table(write("a.jsonl", [{"text": "a", "label": x} for x in (10, 2, 10)]))
    assert label_names(table) == ["2", "10"]
    assert [e.labels for e in encode_labelled(table, tokenizer, 16, "error", ["2", "10"])] == [[1], [0], [1]]
    with pytest.raises(EfftuneError, match="row 1 has the label '10', which the training file does not have"):
        encode_labelled(table, tokenizer, 16, "error", ["2", "3"])
    with pytest.raises(EfftuneError, match="one label"):
        label_names(read_table(write("b.jsonl", [{"text": "a", "label": 1}])))
    with pytest.raises(EfftuneError, match="no column 'label'"):
        label_names(read_table(write("c.txt", "x")))
    with pytest.raises(EfftuneError, match="--task classification"):
        encode_lm(table, tokenizer, 16, "error")


def test_the_held_out_part_is_whole_rows_and_the_same_every_time(write, tokenizer):
    path = write("a.jsonl", [{"text": f"the cat {i} " * 9} for i in range(30)])
    made = encode_lm(read_table(path), tokenizer, 16, "error")
    kept, held = split(made, 0.1)
    assert len({e.row for e in held}) == 3 and not {e.row for e in held} & {e.row for e in kept}
    assert len(kept) + len(held) == len(made) and split(made, 0.1)[1] == held
    assert split(made, 0.0)[1] == []


def test_reading_draws_no_random_numbers(write):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    read_table(write("a.txt", "x"))
    assert torch.equal(before, torch.get_rng_state()) and data.LAYOUTS
