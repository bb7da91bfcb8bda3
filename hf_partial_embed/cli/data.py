"""The texts that commands are given: a file, a saved data set or one of the Hub, and the part that is held out."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import PartialEmbeddingError

__all__ = ["Texts", "read_data", "read_file", "split"]


@dataclass(frozen=True)
class Texts:
    """What was read, in order.

    Attributes:
        values: each a text, or a conversation: a list of messages with `role` and `content`.
        conversations: whether they are conversations, for the tokenizer's chat template.
    """

    values: list[Any]
    conversations: bool

    def rendered(self, tokenizer: Any) -> list[str]:
        """The texts as the model reads them.

        Raises:
            `PartialEmbeddingError`: conversations, and a tokenizer without a chat template, or one that refuses them.
        """
        if not self.conversations:
            return self.values
        if not getattr(tokenizer, "chat_template", None):
            raise PartialEmbeddingError(
                "DATA holds messages, but the tokenizer has no chat template to write them with. Give one to the "
                'tokenizer, or texts under "text".'
            )
        texts = []
        for number, messages in enumerate(self.values, 1):
            try:
                texts.append(tokenizer.apply_chat_template(messages, tokenize=False))
            except Exception as error:  # a template raises whatever it likes
                raise PartialEmbeddingError(f"The chat template refuses conversation {number}: {error}") from error
        return texts


def read_data(source: str, *, split: str, column: str | None) -> Texts:
    """Read all of DATA.

    Args:
        source: a text file with a text a line; a `.json` or `.jsonl` file of JSON lines, each a string or an object
            with `text` or `messages`; a folder that `datasets` has saved; or a Hub id of a data set.
        split: of a data set with several.
        column: the field to take, if it is neither `text` nor `messages`.

    Raises:
        `PartialEmbeddingError`: it cannot be read, is empty, or has records of another kind; says where.
    """
    path = Path(source)
    return read_file(path, column) if path.is_file() else _texts(source, _dataset(source, split), column)


def read_file(path: Path, column: str | None = None) -> Texts:
    """The texts of a file, as `read_data` reads it."""
    as_json = path.suffix in (".json", ".jsonl")
    return _texts(
        str(path), ((where, _json(where, line) if as_json else line) for where, line in _lines(path)), column
    )


def _texts(source: str, records: Iterable[tuple[str, Any]], column: str | None) -> Texts:
    found = [_value(where, record, column) for where, record in records]
    found = [value for value in found if value if not isinstance(value, str) or value.strip()]
    if not found:
        raise PartialEmbeddingError(f"{source} has no text in it.")
    kinds = {isinstance(value, str) for value in found}
    if len(kinds) > 1:
        raise PartialEmbeddingError(f"{source} has texts and conversations. Give files of one kind.")
    return Texts(found, conversations=not kinds.pop())


def split(texts: list[str], share: float, seed: int) -> tuple[list[str], list[str]]:
    """Part off a share of the texts, drawn at random: those to train on, those held out, each in their order.

    A text that occurs more than once goes as a whole to one of them.

    Raises:
        `PartialEmbeddingError`: nothing would be left on one side.
    """
    different = list(dict.fromkeys(texts))
    number = max(1, round(share * len(different))) if share else 0
    if number >= len(different):
        raise PartialEmbeddingError(
            f"DATA has {len(different)} different texts, too few to hold out {number} of them. Give more, or "
            "--held-out 0 to do without a measurement."
        )
    held_out = set(random.Random(seed).sample(different, number))
    return [text for text in texts if text not in held_out], [text for text in different if text in held_out]


def _lines(path: Path) -> list[tuple[str, Any]]:
    try:
        text = path.read_text("utf-8")
    except (OSError, ValueError) as error:
        raise PartialEmbeddingError(f"Cannot read the texts from {path}: {error}") from error
    lines = enumerate(text.split("\n"), 1)
    return [(f"{path}, line {number},", line.removesuffix("\r")) for number, line in lines if line.strip()]


def _json(where: str, line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise PartialEmbeddingError(f"{where} is no JSON: {error}") from error


def _value(where: str, record: Any, column: str | None) -> Any:
    if isinstance(record, str):
        return record
    names = ("text", "messages") if column is None else (column,)
    name = next((name for name in names if isinstance(record, dict) and name in record), None)
    value = None if name is None else record[name]
    if isinstance(value, str) or _is_conversation(value):
        return value
    raise PartialEmbeddingError(
        f"{where} has no text: it must be a string, or have one of {list(names)}, with a string or a list of messages "
        '{"role": ..., "content": ...} in it. Name another field with --column.'
    )


def _is_conversation(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(message, dict) and isinstance(message.get("role"), str) and "content" in message
        for message in value
    )


def _dataset(source: str, split_name: str) -> Iterator[tuple[str, Any]]:
    from ..optional import need

    datasets = need("datasets", "train", "reading a data set")
    folder = Path(source)
    saved = any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))
    try:
        data = datasets.load_from_disk(source) if saved else datasets.load_dataset(source, split=split_name)
        if isinstance(data, datasets.DatasetDict):
            data = data[split_name]
    except Exception as error:  # it raises errors of many libraries
        raise PartialEmbeddingError(
            f"DATA {source!r} is no file here, and cannot be read as a data set with --split {split_name}: "
            f"{type(error).__name__}: {error}"
        ) from error
    return _numbered(source, data)


def _numbered(source: str, data: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    for number, record in enumerate(data, 1):
        yield f"{source}, record {number},", record
