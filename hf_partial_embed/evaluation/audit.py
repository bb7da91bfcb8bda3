"""Which tokens that a model will be given have rows that were never trained, and what else goes wrong with tokens."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..attachment.attachment import attachments_of
from ..errors import PartialEmbeddingError, shorten, visible
from ..initializers.table_statistics import trained_mask
from ..layout.tables import Table, VocabularyLayout, find_layout
from ..tokens.reserved import is_reserved_name
from ..tokens.vocabulary import encode_all, known_id, plain_tokenizer
from .untrained import KINDS, Finding, untrained_rows

__all__ = ["AuditReport", "Problem", "UntrainedToken", "audit_tokens", "judge_rows"]

SEVERITIES = ("error", "warning", "note")


@dataclass(frozen=True)
class UntrainedToken:
    """A token in use with a row that was never trained.

    Attributes:
        token, id: which.
        severity: `"error"` where the chat template or the end of a text uses it, `"warning"` where it occurs in data,
            `"note"` where it only pads.
        uses: what uses it.
        kind: how its row tells, see `evaluation.untrained`.
        tables: `"input"`, `"output"`, or both; a tied row is an input row.
        details: what tells, by table.
        count: how often it occurs in the data.
    """

    token: str
    id: int
    severity: str
    uses: list[str]
    kind: str
    tables: list[str]
    details: dict[str, str]
    count: int = 0


@dataclass(frozen=True)
class Problem:
    """Something else that is wrong with tokens.

    Attributes:
        severity: `"error"`, `"warning"` or `"note"`.
        what: the problem.
        remedy: a line of code.
        tokens: the tokens that it is about.
    """

    severity: str
    what: str
    remedy: str
    tokens: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class AuditReport:
    """What `audit_tokens` found. Prints as a table, the worst first.

    Attributes:
        rows: the untrained tokens, the worst first.
        problems: what else is wrong, each with its remedy, the worst first.
        in_use: how many tokens were looked at.
    """

    rows: list[UntrainedToken]
    problems: list[Problem]
    in_use: int

    @property
    def untrained(self) -> list[str]:
        """Texts of the tokens in use whose rows were never trained, the worst first."""
        return [row.token for row in self.rows]

    @property
    def remedy(self) -> str | None:
        """A line of code that gives the untrained rows a start, to be trained from."""
        return f"train_tokens(model, tokenizer, {self.untrained!r}, init='subtoken_mean')" if self.rows else None

    def to_dict(self) -> dict[str, Any]:
        """All of it, as JSON can hold it."""
        return {
            "in_use": self.in_use,
            "untrained": [asdict(row) for row in self.rows],
            "problems": [asdict(problem) for problem in self.problems],
            "remedy": self.remedy,
        }

    def __str__(self) -> str:
        lines = [f"{self.in_use} tokens in use: {len(self.rows)} untrained, {len(self.problems)} other problems"]
        for severity in SEVERITIES:
            rows = [row for row in self.rows if row.severity == severity]
            width = max((len(repr(row.token)) for row in rows), default=0)
            for row in rows:
                uses = ", ".join(row.uses)
                why = "; ".join(f"{table}: {row.details[table]}" for table in row.tables)
                lines.append(f"{severity:8}{visible(repr(row.token)):{width}}  id {row.id:<7} {uses} | {why}")
            if rows:
                names = [row.token for row in rows]
                lines.append(f"        -> train_tokens(model, tokenizer, {names[:20]!r}, init='subtoken_mean')")
                lines += [f"           and {len(names) - 20} more, all in report.untrained"] if len(names) > 20 else []
            for problem in self.problems:
                if problem.severity == severity:
                    lines += [f"{severity:8}{visible(problem.what)}", f"        -> {visible(problem.remedy)}"]
        return "\n".join(lines)


def audit_tokens(model: Any, tokenizer: Any, data: Iterable[Any] | None = None) -> AuditReport:
    """Find tokens that will be used, but whose rows were never trained, and other traps around tokens.

    In use are: what the chat template writes (a sample conversation, with and without a generation prompt, system
    message and tools), `eos`, `bos` and `pad`, the ends that the generation config has, and what occurs in `data`. A
    row is judged by the model's own rows, see `evaluation.untrained`, in the input embeddings and, where it is not
    tied, in the head. The model is not run.

    Args:
        model: a `transformers` model; rows that are attached count as they are now.
        tokenizer: its tokenizer (or a processor that has one).
        data: what it will be given, streamed: texts, lists of messages, lists of ids, or the rows of a dataset with
            `"text"`, `"messages"` or `"input_ids"`.

    Returns:
        An `AuditReport`.

    Raises:
        `PartialEmbeddingError`: a model without embeddings; data of another kind.
    """
    tokenizer = plain_tokenizer(tokenizer, needed=True)
    layout = find_layout(model)
    uses: dict[int, list[str]] = {}

    def note(ids: Iterable[int], use: str) -> None:
        for token_id in ids:
            if use not in (known := uses.setdefault(token_id, [])):
                known.append(use)

    chats = _sample_chats(tokenizer)
    for ids in encode_all(tokenizer, chats, unknown=True):
        note(ids, "chat template")
    roles = {role: getattr(tokenizer, f"{role}_token_id", None) for role in ("eos", "bos", "pad")}
    for role, token_id in roles.items():
        note([token_id] if token_id is not None else [], role)
    ends = _ends(model)
    note(ends, "generation config's eos")
    counts = _count(tokenizer, data)
    note(counts, "data")
    sizes = [table.size for table in layout.tables if table.role in ("input", "output")]
    reach = min(sizes)
    findings = judge_rows(model, tokenizer, [i for i in uses if i < reach], layout=layout)
    texts = {token_id: text for text, token_id in tokenizer.get_vocab().items()}
    padding = roles["pad"]
    rows = []
    for token_id, by_table in findings.items():
        if token_id == padding and uses[token_id] == ["pad"]:
            continue  # it is masked out, and many models keep its row at zero
        kind = min((finding.kind for finding in by_table.values()), key=KINDS.index)
        severity = "warning" if uses[token_id] == ["data"] else "error"
        details = {name: finding.detail for name, finding in by_table.items()}
        rows.append(
            UntrainedToken(
                texts.get(token_id, f"id {token_id}"), token_id, severity, uses[token_id], kind, list(by_table),
                details, counts[token_id],
            )
        )  # fmt: skip
    rows.sort(key=lambda row: (SEVERITIES.index(row.severity), KINDS.index(row.kind), -row.count, row.id))
    problems = [
        *_without_row(texts, reach),
        *_end_problems(tokenizer, ends, texts),
        *_padding_problems(tokenizer, ends),
        *_split_markers(tokenizer, chats),
        *_unread_template(tokenizer, chats),
    ]
    problems.sort(key=lambda problem: SEVERITIES.index(problem.severity))
    return AuditReport(rows, problems, len(uses))


def judge_rows(
    model: Any, tokenizer: Any, ids: Iterable[int], *, layout: VocabularyLayout | None = None
) -> dict[int, dict[str, Finding]]:
    """Which rows were never trained: for each that was not, what tells, by `"input"` and `"output"`.

    In a sharded run every process calls it, and gathers each table once.
    """
    layout = layout or find_layout(model)
    texts = {token_id: text for text, token_id in tokenizer.get_vocab().items()}
    found: dict[int, dict[str, Finding]] = {}
    listed = list(ids)
    for table in layout.tables:
        if table.role not in ("input", "output"):
            continue
        values = _present_values(model, table)
        if values.dim() != 2:
            continue
        size = len(values)
        belongs = trained_mask(size, tokenizer, None)
        belongs[[i for i, text in texts.items() if i < size and is_reserved_name(text)]] = False
        unused = [i for i in range(size) if i not in texts or is_reserved_name(texts[i])]
        unused += [i for i in _impossible_bytes(tokenizer) if i < size]
        rows = [i for i in listed if i < size]
        for token_id, finding in untrained_rows(values, rows, belongs, unused, texts).items():
            found.setdefault(token_id, {})[table.role] = finding
    return found


def _present_values(model: Any, table: Table) -> Tensor:
    """A table with the rows that are attached to it, `[V, d]`."""
    values = table.values().movedim(table.dim, 0)
    for attachment in attachments_of(model):
        own = next((other for other in attachment.trained if other.name == table.name), None)
        if own is not None:
            values = values.detach().clone()
            values[attachment.ids] = attachment.current_rows(own).to(values)
    return values


def _impossible_bytes(tokenizer: Any) -> list[int]:
    """Ids of bytes that no UTF-8 text has."""
    never = [0xC0, 0xC1, *range(0xF5, 0x100)]
    names = [f"<0x{byte:02X}>" for byte in never]
    backend = getattr(tokenizer, "_tokenizer", None)
    if "ByteLevel" in repr(getattr(backend, "decoder", None)):
        names += [
            chr(byte) for byte in never
        ]  # byte-level BPE writes bytes from 0xAE on as the characters of that number
    return [i for name in names if (i := known_id(tokenizer, name)) is not None]


_REPLY = "Fine, thank you."
_TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Add two numbers.",
        "parameters": {"type": "object", "properties": {"a": {"type": "number"}, "b": {"type": "number"}}},
    },
}


def _conversations() -> Iterator[list[dict[str, Any]]]:
    chat = [{"role": "user", "content": "How are you?"}, {"role": "assistant", "content": _REPLY}]
    yield chat
    yield [{"role": "system", "content": "Be brief."}, *chat]
    call = {"id": "abcdefghi", "type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}
    yield [
        chat[0],
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "add", "tool_call_id": "abcdefghi", "content": "3"},
        {"role": "assistant", "content": _REPLY},
    ]


def _render(tokenizer: Any, messages: list[dict[str, Any]], **options: Any) -> str | None:
    """What the template makes of messages, `None` where it refuses them."""
    if not tokenizer.chat_template:
        return None
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))
    except Exception:  # noqa: BLE001  # a template may refuse a role, tools, or anything
        return None


def _sample_chats(tokenizer: Any) -> list[str]:
    rendered = [
        _render(
            tokenizer, messages if generation is False else messages[:-1], add_generation_prompt=generation, **tools
        )
        for messages, generation, tools in itertools.product(_conversations(), (False, True), ({}, {"tools": [_TOOL]}))
    ]
    return list(dict.fromkeys(text for text in rendered if text is not None))


def _unread_template(tokenizer: Any, chats: list[str]) -> list[Problem]:
    if chats or not tokenizer.chat_template:
        return []
    what = "the chat template refuses all sample conversations, so its tokens were not looked at"
    return [Problem("note", what, "audit_tokens(model, tokenizer, data=[[{'role': ..., 'content': ...}, ...]])")]


def _ends(model: Any) -> list[int]:
    """The ids at which `generate` stops."""
    for config in (getattr(model, "generation_config", None), getattr(model, "config", None)):
        end = getattr(config, "eos_token_id", None)
        if end is not None:
            return [int(token_id) for token_id in (end if isinstance(end, (list, tuple)) else [end])]
    return []


def _count(tokenizer: Any, data: Iterable[Any] | None) -> Counter[int]:
    counts: Counter[int] = Counter()
    if data is None:
        return counts
    if isinstance(data, (str, Mapping)) or not isinstance(data, Iterable):
        raise PartialEmbeddingError(f"data must be an iterable of texts, but got {shorten([data])}. Pass [text].")
    texts: list[str] = []
    for entry in data:
        value = entry
        if isinstance(entry, Mapping):
            value = next((entry[key] for key in ("input_ids", "messages", "text") if key in entry), None)
        if isinstance(value, str):
            texts.append(value)
        elif isinstance(value, Tensor) or (isinstance(value, (list, tuple)) and all(type(i) is int for i in value)):
            counts.update(torch.as_tensor(value).flatten().tolist())
        elif isinstance(value, (list, tuple)) and all(isinstance(message, Mapping) for message in value):
            if (text := _render(tokenizer, list(value))) is None:
                raise PartialEmbeddingError(f"The chat template does not take the messages {shorten(value)}.")
            texts.append(text)
        else:
            raise PartialEmbeddingError(
                f"data has {shorten([entry])}: give texts, lists of messages, lists of ids, or dicts with 'text', "
                "'messages' or 'input_ids'."
            )
        if len(texts) >= 512:
            counts.update(itertools.chain.from_iterable(encode_all(tokenizer, texts, unknown=True)))
            texts = []
    counts.update(itertools.chain.from_iterable(encode_all(tokenizer, texts, unknown=True)))
    return counts


def _without_row(texts: Mapping[int, str], reach: int) -> list[Problem]:
    lacking = [text for token_id, text in sorted(texts.items()) if token_id >= reach]
    if not lacking:
        return []
    what = f"{len(lacking)} tokens have no row, since the tables have {reach} rows: {shorten(lacking)}"
    return [Problem("error", what, f"add_tokens(model, tokenizer, {lacking[:20]!r})", lacking)]


def _end_problems(tokenizer: Any, ends: list[int], texts: Mapping[int, str]) -> list[Problem]:
    """Whether generation stops at what the template writes behind a reply."""
    closed = _render(tokenizer, next(_conversations()))
    if closed is None or _REPLY not in closed:
        return []
    behind = closed[closed.rindex(_REPLY) + len(_REPLY) :]
    (ids,) = encode_all(tokenizer, [behind], unknown=True)
    added = tokenizer.added_tokens_decoder
    end = next((token_id for token_id in ids if token_id in added), None)
    shown = [texts.get(token_id, f"id {token_id}") for token_id in ends]
    if end is None:
        if set(ids) & set(ends):
            return []
        what = f"the chat template writes no end token behind a reply, only {behind!r}: the model cannot learn to stop"
        return [
            Problem("error", what, "tokenizer.chat_template = ...  # let it write eos_token behind each reply", shown)
        ]
    if end in ends:
        return []
    name = texts[end]
    what = f"generation stops at {shown}, but the chat template ends a reply with {name!r}: generation runs on"
    return [Problem("error", what, f"model.generation_config.eos_token_id = {[*ends, end]}", [name, *shown])]


def _padding_problems(tokenizer: Any, ends: list[int]) -> list[Problem]:
    padding = tokenizer.pad_token_id
    if padding is None or padding not in {tokenizer.eos_token_id, *ends}:
        return []
    what = (
        f"{tokenizer.pad_token!r} pads and ends: where labels of padding are masked out, the end is, too, and the "
        "model never learns to stop"
    )
    remedy = 'add_tokens(model, tokenizer, ["<pad>"], special=True, reuse="auto"); tokenizer.pad_token = "<pad>"'
    return [Problem("warning", what, remedy, [tokenizer.pad_token])]


_BAR = "[|\uff5c]"  # DeepSeek's is a wide one
_MARKER = re.compile(rf"<{_BAR}[^<>|\uff5c\s]+{_BAR}>|<(?:start|end|begin)_of_\w+>|<\|[^<>|\s]+>|\[/?[A-Z_]{{3,}}\]")


def _split_markers(tokenizer: Any, chats: list[str]) -> list[Problem]:
    """Markers of the template that are no tokens, and come to the model in pieces."""
    found = dict.fromkeys(marker for text in chats for marker in _MARKER.findall(text))
    split = {
        marker: ids
        for marker, ids in zip(found, encode_all(tokenizer, list(found), unknown=True), strict=True)
        if len(ids) > 1
    }
    return [
        Problem(
            "warning",
            f"the chat template writes {marker!r}, which is no token: it is read as {len(ids)} pieces",
            f"add_tokens(model, tokenizer, [{marker!r}], special=True)",
            [marker],
        )
        for marker, ids in split.items()
    ]
