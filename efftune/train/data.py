"""From a file to encoded examples: read, recognise the layout by its columns, tokenise, mark what the loss counts."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from efftune.errors import EfftuneError

IGNORED = -100  # label of a token that the loss does not count
# Layout -> the names that its columns go by. The first layout whose columns are all there is taken.
LAYOUTS: dict[str, tuple[tuple[str, ...], ...]] = {
    "messages": (("messages",),),
    "prompt": (("prompt",), ("completion",)),
    "question": (("question",), ("answer",)),
    "label": (("text", "sentence"), ("label",)),
    "text": (("text",),),
}
WOULD_DO = "prompt + completion, question + answer, messages, text, or text + label"
READERS = {".jsonl": "json", ".json": "json", ".txt": "text", ".md": "text", ".csv": "csv", ".tsv": "csv"}
READERS[".parquet"] = "parquet"


@dataclass
class Example:
    sample_id: int  # its number in the file: the same in every run and every epoch
    input_ids: list[int]
    labels: list[int]  # one for each token, IGNORED where the loss does not count; for classification just the class
    row: int = 0  # the row of the file it is from: windows of one text share it


@dataclass
class Table:
    path: Path
    layout: str
    rows: Any  # a datasets.Dataset
    columns: list[str]  # those of the layout, in its order

    def __iter__(self) -> Iterator[list[Any]]:
        for n, row in enumerate(self.rows, start=1):
            cells = [row[name] for name in self.columns]
            for name, cell in zip(self.columns, cells, strict=True):
                if cell is None or cell == "":
                    raise EfftuneError(
                        f"{self.path}: row {n} has nothing in column '{name}'; fill it in or delete the row."
                    )
            yield cells


def read_table(path: str | Path) -> Table:
    """Reads a data file through `datasets`, without network access."""
    path = Path(path)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise EfftuneError(f"{path} {what}; --data and --eval-data take one file ({', '.join(READERS)}).")
    if path.suffix.lower() not in READERS:
        raise EfftuneError(f"{path}: '{path.suffix}' is not read; convert it to one of {', '.join(READERS)}.")
    with path.open("rb") as file:
        if not any(line.strip() for line in file):
            raise EfftuneError(f"{path} is empty; give a file with at least one example.")

    kind, options = READERS[path.suffix.lower()], {}
    if kind == "text":
        options = {"sample_by": "document"}
    if kind == "csv":
        options = _csv_options(path)
    if path.suffix.lower() == ".jsonl":
        _check_json_lines(path)
    rows = _load(path, kind, options)
    layout, columns = _recognise(rows.column_names)
    if layout is None:
        raise EfftuneError(f"{path} has the columns {', '.join(rows.column_names)}; rename them to one of {WOULD_DO}.")
    return Table(path, layout, rows, columns)


def _load(path: Path, kind: str, options: dict[str, Any]) -> Any:
    import datasets

    logger = datasets.logging.get_verbosity()
    bars = datasets.are_progress_bars_disabled()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # it logs what we raise
    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(kind, data_files=str(path), split="train", **options)
    except OSError as error:
        raise EfftuneError(f"{path} cannot be read: {error}.") from error
    except Exception as error:
        cause = str(error.__cause__ or error).strip().splitlines()[0].rstrip(".")
        raise EfftuneError(
            f"{path} is not a readable {kind} file ({cause}); correct it or convert it to JSONL."
        ) from error
    finally:
        datasets.logging.set_verbosity(logger)
        if not bars:
            datasets.enable_progress_bars()


def _recognise(names: list[str]) -> tuple[str | None, list[str]]:
    by_lower = {name.lower().strip(): name for name in names}
    for layout, wanted in LAYOUTS.items():
        found = [next((by_lower[a] for a in aliases if a in by_lower), None) for aliases in wanted]
        if all(found):
            return layout, [name for name in found if name]
    return None, []


def _check_json_lines(path: Path) -> None:
    # pyarrow's message counts rows of a block, not lines of the file
    with path.open(encoding="utf-8", errors="replace") as file:
        for n, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                ok = isinstance(json.loads(line), dict)
            except ValueError:
                ok = False
            if not ok:
                raise EfftuneError(
                    f"{path} is malformed at line {n}: each line must be one JSON object; correct that line."
                )


def _csv_options(path: Path) -> dict[str, Any]:
    """Delimiter, header or names for `datasets`; raises at the first line whose number of fields differs.

    Tab-separated files take quotes literally, as SST-2 does: a lone quote in a sentence would swallow lines.
    """
    tabs = path.suffix.lower() == ".tsv"
    dialect: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if tabs else {"delimiter": ","}
    first: list[str] = []
    second_column: set[str] = set()
    rows = 0
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        reader = csv.reader(file, **dialect)
        for fields in reader:
            if not fields:
                continue
            first = first or fields
            if len(fields) != len(first):
                raise EfftuneError(
                    f"{path} is malformed at line {reader.line_num}: {len(fields)} fields where the first line has "
                    f"{len(first)}; correct that line."
                )
            rows += 1
            if rows > 1 and len(fields) == 2:
                second_column.add(fields[1])
    # na_filter: pandas would read the sentence "null" as missing
    options = dialect | {"na_filter": False}
    if _recognise(first)[0]:
        return options
    labels = len(first) == 2 and (len(second_column) <= max(2, rows // 2))
    if labels and first[1] in second_column and first[1].strip().lower() not in ("label", "class", "target"):
        return options | {"header": None, "names": ["text", "label"]}
    return options


# Encoding


def encode_lm(table: Table, tokenizer: Any, seq_len: int, too_long: str) -> list[Example]:
    """Token ids and labels. The loss counts completions, answers, assistant turns, and every token of plain text."""
    if table.layout == "label":
        raise EfftuneError(f"{table.path} has text and labels, which is --task classification, not causal-lm.")
    eos = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    if table.layout == "text":
        return _windows(table, tokenizer, seq_len, eos)
    examples = []
    for n, cells in enumerate(table):
        if table.layout == "messages":
            ids, labels = _encode_messages(table, n + 1, cells[0], tokenizer)
        else:
            prompt, answer = str(cells[0]), str(cells[1])
            if table.layout == "question":
                prompt, answer = f"Question: {prompt}\nAnswer:", f" {answer}"
            head = tokenizer(prompt)["input_ids"]
            if eos and head[-1:] == eos:  # some tokenizers end every text themselves
                head = head[:-1]
            tail = tokenizer(answer, add_special_tokens=False)["input_ids"] + eos
            ids, labels = head + tail, [IGNORED] * len(head) + tail
        if len(ids) > seq_len:
            if too_long == "drop":
                continue
            if too_long == "error":
                raise _too_long(table, n + 1, len(ids), seq_len)
            ids, labels = ids[:seq_len], labels[:seq_len]
        labels = [IGNORED, *labels[1:]]  # nothing comes before the first token that could predict it
        if any(label != IGNORED for label in labels):
            examples.append(Example(n, ids, labels, n))
    return _some(examples, table)


def _windows(table: Table, tokenizer: Any, seq_len: int, eos: list[int]) -> list[Example]:
    examples: list[Example] = []
    for n, (text,) in enumerate(table):
        # verbose=False: a warning that the text is longer than the model, which is why it is cut
        ids = tokenizer(str(text), verbose=False)["input_ids"]
        ids = ids if ids[-1:] == eos else ids + eos
        for start in range(0, len(ids), seq_len):
            piece = ids[start : start + seq_len]
            if len(piece) > 1:
                examples.append(Example(len(examples), piece, [IGNORED, *piece[1:]], n))
    return _some(examples, table)


def _encode_messages(table: Table, n: int, messages: list[dict], tokenizer: Any) -> tuple[list[int], list[int]]:
    """The loss counts what the assistant says, found as the text that each assistant turn adds to the rendered chat."""
    if not getattr(tokenizer, "chat_template", None):
        raise EfftuneError(
            f"{table.path} has messages, and this model's tokenizer has no chat template; "
            "take a chat model, or rewrite the data as prompt + completion."
        )
    if not getattr(tokenizer, "is_fast", False):
        raise EfftuneError(
            "Messages need a fast tokenizer; install `tokenizers`, or rewrite them as prompt + completion."
        )

    from jinja2 import TemplateError

    def render(part: list[dict], prompt: bool = False) -> str:
        return tokenizer.apply_chat_template(part, tokenize=False, add_generation_prompt=prompt)

    try:
        whole = render(messages)
        spans = []
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                before, after = render(messages[:i], prompt=True), render(messages[: i + 1])
                if not (whole.startswith(before) and whole.startswith(after)):
                    raise EfftuneError(
                        f"{table.path}: row {n}: this chat template rewrites earlier turns, so the assistant's tokens "
                        "cannot be told apart; rewrite the data as prompt + completion."
                    )
                spans.append((len(before), len(after)))
    except TemplateError as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise EfftuneError(
            f"{table.path}: row {n}: the model's chat template refuses these messages ({reason}); "
            "correct that row, or rewrite the data as prompt + completion."
        ) from error
    except (KeyError, TypeError) as error:
        raise EfftuneError(
            f"{table.path}: row {n}: messages must be a list of objects with 'role' and 'content' ({error!r})."
        ) from error
    coded = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
    ids = coded["input_ids"]
    said = [any(a <= start < end <= b for a, b in spans) for start, end in coded["offset_mapping"]]
    return ids, [token if counts else IGNORED for token, counts in zip(ids, said, strict=True)]


def encode_labelled(table: Table, tokenizer: Any, seq_len: int, too_long: str, names: list[str]) -> list[Example]:
    """Token ids and the number of the class in `names`."""
    number = {name: i for i, name in enumerate(names)}
    examples = []
    for n, (text, label) in enumerate(table):
        if str(label) not in number:
            raise EfftuneError(
                f"{table.path}: row {n + 1} has the label '{label}', which the training file does not have "
                f"({', '.join(names[:10])}); correct one of the two."
            )
        ids = tokenizer(str(text), verbose=False)["input_ids"]
        if len(ids) > seq_len:
            if too_long == "drop":
                continue
            if too_long == "error":
                raise _too_long(table, n + 1, len(ids), seq_len)
            ids = tokenizer(str(text), truncation=True, max_length=seq_len)["input_ids"]
        examples.append(Example(n, ids, [number[str(label)]], n))
    return _some(examples, table)


def label_names(table: Table) -> list[str]:
    """The classes of a labelled table in a fixed order: by number where all are numbers, else by name."""
    if table.layout != "label":
        raise EfftuneError(f"{table.path} has no column 'label' beside 'text', which --task classification needs.")
    names = {str(label) for _, label in table}
    if len(names) < 2:
        raise EfftuneError(f"{table.path} has the one label '{names.pop()}'; classification needs at least two.")
    if len(names) > 1000:
        raise EfftuneError(f"{table.path} has {len(names)} different labels; classification needs a column of classes.")
    numeric = all(name.lstrip("-").isdigit() for name in names)
    return sorted(names, key=int) if numeric else sorted(names)


def prompt_of(example: Example) -> list[int]:
    """What the loss does not count at the start of an example; of plain text, its first tokens."""
    counted = next((i for i, label in enumerate(example.labels) if label != IGNORED), 0)
    return example.input_ids[: counted if counted > 1 else 12]


def split(examples: list[Example], fraction: float) -> tuple[list[Example], list[Example]]:
    """(training, held out): whole rows of the file where it has many, else windows. The same for every seed."""
    rows = len({example.row for example in examples})
    groups = [example.row if rows >= 20 else example.sample_id for example in examples]
    names = sorted(set(groups))
    count = min(len(names) - 1, max(1, round(len(names) * fraction))) if fraction else 0
    held = {names[i] for i in np.random.default_rng(0).permutation(len(names))[:count]}
    kept = [e for e, group in zip(examples, groups, strict=True) if group not in held]
    return kept, [e for e, group in zip(examples, groups, strict=True) if group in held]


def _too_long(table: Table, n: int, length: int, seq_len: int) -> EfftuneError:
    return EfftuneError(
        f"{table.path}: row {n} has {length} tokens and a row holds {seq_len}; "
        "raise --seq-len as far as the model allows, or take --too-long truncate or --too-long drop."
    )


def _some(examples: list[Example], table: Table) -> list[Example]:
    if not examples:
        raise EfftuneError(f"{table.path} leaves no example to train on; raise --seq-len or check its columns.")
    return examples
