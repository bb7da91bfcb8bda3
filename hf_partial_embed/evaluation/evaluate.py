"""Before and after on the same texts: what new tokens save, and what they do to a model's predictions."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import Any

from ..attachment.attachment import attachments_of
from ..attachment.partial import PartialEmbedding
from ..errors import PartialEmbeddingError, count, shorten
from ..initializers.running import undisturbed
from ..tokens.reading import Reading, TextReader
from ..tokens.vocabulary import plain_tokenizer
from .alignment import AlignedText, Window, windows_of
from .old_and_new import Vocabularies, live_vocabularies, saved_vocabularies
from .report import BeforeAfter, EvaluationReport
from .scoring import Columns, Scorer, Side, batches
from .states import HeadStates
from .swapped import swapped_rows
from .tally import Tally
from .timing import seconds_per_text

__all__ = ["evaluate"]

_TEXTS_AT_ONCE = 256
_LONGEST_WINDOW = 4096

Source = str | os.PathLike[str] | tuple[Any, Any] | PartialEmbedding


def evaluate(
    base: Source | None,
    adapted: Source,
    texts: Iterable[str],
    *,
    batch_size: int = 8,
    max_length: int | None = None,
    stride: int | None = None,
    timed_texts: int = 0,
    progress: bool = True,
) -> EvaluationReport:
    """Compare a model that has new tokens with the one that it was made from, on texts.

    Scoring is that of a rolling log-likelihood. The context begins with the bos token (else eos; else the first
    token is not scored, nor its bytes), and every other token is scored once. A text longer than `max_length` goes
    on in windows, each of which begins `stride` tokens before the first one that it scores. What concerns a part of
    a text is aligned by characters: a token of the original tokenisation across the border of two parts gives each
    of them as much as it has of the token's bytes.

    *Adoption* is the mean over the new tokens' occurrences of `p(token) / (p(token) + p(its old pieces))`. The old
    pieces are those of the original tokenisation at this place; the first one's probability is taken in the same
    context as the token's, that of the others from the run over the original tokenisation. Where that has no
    border at both ends of the token, the first piece of the token's own text stands for all of them, and adoption is
    rather too low.

    Each window runs once through each model, and each position once through the head, some hundred positions at a
    time. Where one live model is both sides, the two readings share what they have in common: texts without a new
    token run once, and the predictions up to the first token that differs are measured once. Logits of all positions
    exist only in models whose head cannot be run apart, which a note then says. Masked language models,
    encoder-decoders and models without a head have their tokens counted; the notes say what is left out.

    Args:
        base: the model before: a folder or Hub id, or a pair of model and tokenizer. `None` where `adapted` is a
            `PartialEmbedding` of tokens that were added: then one model is both (`partial.evaluate(texts)`). The
            original tokenisation is that of a copy of the tokenizer's backend without the new tokens, and before is
            this model with the new tokens' outputs left out of the softmax, which is the base model bit for bit.
        adapted: the model after: a folder, a Hub id or a pair, or a `PartialEmbedding`.
        texts: any number of texts, read once; empty ones are left out.
        batch_size: windows in a batch, at most.
        max_length: ids in a window; the context of the model if not given, but no more than 4,096.
        stride: tokens of context with which each further window begins; half of `max_length` if not given.
        timed_texts: on how many texts generation is timed, before and after; a few seconds each. None by default.
        progress: whether to show a bar.

    Returns:
        `EvaluationReport`: `print` it, or see `to_dict()`.

    Raises:
        `PartialEmbeddingError`: texts that are none, or empty altogether; models whose vocabularies do not belong
            together; a tokenizer without a fast backend; log-probabilities that are not finite; without a base, rows
            of tokens that were there before, whose old values are not on the model, or that are on no model any more.
    """
    if base is None:
        if not isinstance(adapted, PartialEmbedding):
            raise PartialEmbeddingError(
                "Without a base, adapted must be a PartialEmbedding, whose model is the base as well. Pass the model "
                "that the tokens were added to."
            )
        adapted._require_attached("evaluate")
        after = before = (adapted.model, plain_tokenizer(adapted.tokenizer, needed=True))
        vocabularies = live_vocabularies(adapted)
    else:
        before, after = _load(base, "base"), _load(adapted, "adapted")
        vocabularies = saved_vocabularies(*before, *after)
    hidden = vocabularies.new if base is None else ()
    readers = (TextReader(before[1], hidden), TextReader(after[1]))
    return _evaluate(
        before, after, readers, vocabularies, texts,
        batch_size=batch_size, max_length=max_length, stride=stride, timed_texts=timed_texts, progress=progress,
    )  # fmt: skip


def _load(source: Source, which: str) -> tuple[Any, Any]:
    if isinstance(source, PartialEmbedding):
        if which == "base":
            raise PartialEmbeddingError(
                "base has rows on it. Pass the model that they were added to, or use partial.evaluate(texts)."
            )
        return source.model, plain_tokenizer(source.tokenizer, needed=True)
    if isinstance(source, (str, os.PathLike)):
        from ..files.pretrained import load_model, load_tokenizer

        return load_model(source), plain_tokenizer(load_tokenizer(source), needed=True)
    if not isinstance(source, tuple) or len(source) != 2:
        raise PartialEmbeddingError(
            f"{which} must be a folder, a Hub id or a pair (model, tokenizer), but got {type(source).__name__}."
        )
    model, tokenizer = source
    if which == "base" and attachments_of(model):
        raise PartialEmbeddingError(
            "base has rows on it. Pass the model that they were added to, or use partial.evaluate(texts)."
        )
    return model, plain_tokenizer(tokenizer, needed=True)


def _evaluate(
    before: tuple[Any, Any],
    after: tuple[Any, Any],
    readers: tuple[TextReader, TextReader],
    vocabularies: Vocabularies,
    texts: Iterable[str],
    *,
    batch_size: int,
    max_length: int | None,
    stride: int | None,
    timed_texts: int,
    progress: bool,
) -> EvaluationReport:
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise PartialEmbeddingError(f"batch_size={batch_size!r} must be a whole number from 1 on.")
    live = before[0] is after[0]
    pieces = dict(
        zip(
            vocabularies.new,
            [reading.ids for reading in readers[0].read(list(vocabularies.new.values()))],
            strict=True,
        )
    )
    tally = Tally(vocabularies.new, swapped_rows(after[0], pieces))
    missing = _not_scored(after[0])
    length, context = _window(after[0], after[1], max_length, stride)
    given = len(texts) if isinstance(texts, Sequence) else None
    aligned = _align(_checked(texts), readers, pieces)
    first = next(aligned, None)
    if first is None:
        raise PartialEmbeddingError(
            "There is no text to evaluate: none was given, or all of them are empty. Pass a list of texts."
        )
    samples: list[AlignedText] = []
    with _bar(given, progress) as bar, undisturbed(before[0]), undisturbed(after[0]):
        scorer = None if missing else _scorer(before, after, vocabularies)
        stream = chain([first], aligned)
        while block := list(islice(stream, _TEXTS_AT_ONCE)):
            samples = (samples + [text for text in block if text.new])[:timed_texts]
            if scorer is None:
                for text in block:
                    tally.count(text)
                    bar.update()
            else:
                for text in _score(scorer, block, length, context, batch_size, live):
                    tally.add(text)
                    bar.update()
        report = tally.finish(scored=scorer is not None)
        if scorer is not None and timed_texts:
            report.seconds_per_text = BeforeAfter(*seconds_per_text(before, after, samples))
    report.notes = [*missing, *vocabularies.notes]
    pairs = [f"{r.token!r} and {r.swapped_with!r}" for r in report.per_token if (r.swapped_with or "") > r.token]
    if pairs:
        report.notes.append(
            f"Rows look swapped, each being like the pieces of the other: {'; '.join(pairs[:4])}"
            f"{f'; {len(pairs) - 4} more pairs' if len(pairs) > 4 else ''}."
        )
    if scorer is not None:
        report.max_length, report.stride = length, context
        models = [scorer.after.model, *([] if live else [scorer.before.model])]
        report.forwards = sum(model.forwards for model in models)
        report.notes += _notes(report, scorer)
    elif not report.texts_with_new:
        report.notes.append("No new token occurs in the texts: give texts that contain them.")
    if given is not None and given > report.texts:
        report.notes.append(f"{count(range(given - report.texts), 'text')} left out, being empty.")
    return report


def _notes(report: EvaluationReport, scorer: Scorer) -> list[str]:
    notes = []
    if not report.texts_with_new:
        notes.append(
            "No new token occurs in the texts: only leak and perplexity say something. Give texts that contain them."
        )
    elif report.texts_with_new == report.texts:
        notes.append(
            "Every text has a new token: leak is that at other places of these texts, and perplexity elsewhere that "
            "before the first new token. Give texts without new tokens, too."
        )
    cut = [result.token for result in report.per_token if result.cuts]
    if cut:
        notes.append(f"{count(cut, 'token')} cut other words in two: {shorten(cut, 4)} (see cuts).")
    if not (scorer.after.model.in_chunks and scorer.before.model.in_chunks):
        notes.append("The head cannot be run apart from the model, so the logits of a whole batch are held at once.")
    return notes


def _not_scored(model: Any) -> list[str]:
    """Why a model's log-probabilities cannot be taken, if they cannot."""
    name = type(model).__name__
    get = getattr(model, "get_output_embeddings", lambda: None)
    kind = None
    if getattr(model.config, "is_encoder_decoder", False):
        kind = "an encoder-decoder: what it would be asked to write for a text is not known"
    elif get() is None:
        kind = "a model without a head over its vocabulary"
    elif "MaskedLM" in name or name.endswith("ForPreTraining"):
        kind = "a masked language model: it gives no probability of a text"
    if kind is None:
        return []
    return [f"{name} is {kind}. Tokens were counted; bits per byte, KL, adoption, leak and ranks were not measured."]


def _scorer(before: tuple[Any, Any], after: tuple[Any, Any], vocabularies: Vocabularies) -> Scorer:
    new, sizes = set(vocabularies.new), (vocabularies.size_before, vocabularies.size_after)
    old = set(range(min(sizes))) - new - set(vocabularies.without)
    halves = HeadStates(after[0])
    sides = [
        Side(
            halves if model is after[0] else HeadStates(model),
            Columns(set(range(size)) - old - without),
            next((i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None), None),
        )
        for (model, tokenizer), size, without in zip(
            (before, after), sizes, (set(vocabularies.without), set()), strict=True
        )
    ]
    return Scorer(sides[0], sides[1], Columns(old), new)


def _window(model: Any, tokenizer: Any, max_length: int | None, stride: int | None) -> tuple[int, int]:
    """Length of a window and of the context with which further ones begin."""
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    names = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length", "max_seq_len")
    limits = [value for name in names if isinstance(value := getattr(config, name, None), int) and value > 1]
    context = min(limits) if limits else None
    if max_length is None:
        own = tokenizer.model_max_length
        max_length = min(filter(None, (context, own if isinstance(own, int) else None, _LONGEST_WINDOW)))
    elif isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 2:
        raise PartialEmbeddingError(f"max_length={max_length!r} must be a whole number from 2 on.")
    elif context is not None and max_length > context:
        raise PartialEmbeddingError(
            f"max_length={max_length} is more than {type(model).__name__} can read: its context is {context} tokens."
        )
    if stride is None:
        stride = max_length // 2
    if isinstance(stride, bool) or not isinstance(stride, int) or not 1 <= stride < max_length:
        raise PartialEmbeddingError(
            f"stride={stride!r} must be a whole number from 1 to {max_length - 1}: the tokens of context with which "
            f"each further window of {max_length} begins."
        )
    return max_length, stride


def _checked(texts: Iterable[str]) -> Iterator[tuple[int, str]]:
    if isinstance(texts, (str, bytes, Mapping)) or not isinstance(texts, Iterable):
        raise PartialEmbeddingError(f"texts must be a list of texts, but got {type(texts).__name__}.")
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise PartialEmbeddingError(f"Text {number} is {type(text).__name__}, not a str.")
        if any("\ud800" <= char <= "\udfff" for char in text):
            raise PartialEmbeddingError(
                f"Text {number} is no valid Unicode: it has a lone surrogate, which no tokenizer reads. Decode "
                "the bytes that it came from with errors='replace', or leave it out."
            )
        if text:
            yield number, text


def _align(
    texts: Iterator[tuple[int, str]], readers: tuple[TextReader, TextReader], pieces: Mapping[int, Sequence[int]]
) -> Iterator[AlignedText]:
    while block := list(islice(texts, _TEXTS_AT_ONCE)):
        readings: list[list[Reading]] = [reader.read([text for _, text in block]) for reader in readers]
        for (number, text), before, after in zip(block, *readings, strict=True):
            yield AlignedText(number, text, before, after, pieces)


def _score(
    scorer: Scorer, block: Sequence[AlignedText], length: int, stride: int, batch_size: int, live: bool
) -> Iterator[AlignedText]:
    """Score texts; each is given back when it is done."""
    windows: list[Window] = []
    # Texts of a length stand beside each other, so that batches have little padding.
    for text in sorted(block, key=lambda text: len(text.readings["after"].ids)):
        if live and text.same:
            own = windows_of(text, "both", scorer.after.prefix, length, stride)
        else:
            own = windows_of(text, "before", scorer.before.prefix, length, stride)
            own += windows_of(text, "after", scorer.after.prefix, length, stride, text.shared if live else 0)
            own.sort(key=lambda window: window.reading.starts[window.tokens.start])
        if own:
            windows += own
        else:
            yield text
    done: list[AlignedText] = []
    for batch in batches(windows, batch_size):
        scorer.run(batch)
        for window in batch:
            window.aligned.windows_left -= 1
            if not window.aligned.windows_left:
                done.append(window.aligned)
        if scorer.is_full:
            scorer.score()
            yield from done
            done = []
    scorer.score()
    yield from done


def _bar(total: int | None, progress: bool) -> Any:
    from tqdm.auto import tqdm  # type: ignore[import-untyped]

    return tqdm(total=total, desc="evaluate", unit="text", disable=not progress)
