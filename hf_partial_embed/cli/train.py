"""The command that does the whole of it: `train`, from a model and texts to trained rows and what they are worth."""

from __future__ import annotations

import argparse
import functools
import json
import logging
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import PartialEmbeddingError, count, shorten, visible
from .data import Texts, read_data, split
from .numbers import learning_rate, natural, positive, share, whole_number
from .output import OK, AddCommand, add_out, check_out, fresh_folder, print_json, read_tokens, say
from .trainer import precision, run_trainer
from .unfinished import last_checkpoint, open_work, write_work

if TYPE_CHECKING:
    from ..attachment.partial import PartialEmbedding
    from ..evaluation.report import EvaluationReport

__all__ = ["add_train"]

logger = logging.getLogger(__name__)


def add_train(command: AddCommand) -> None:
    """The arguments of `train`."""
    made = command(
        "train", _train, "add tokens, train their rows, and measure what they are worth",
        "Add tokens to a model, start their rows, train them on texts while all old rows keep every bit, and measure\n"
        "before and after on texts that were held out. OUT gets rows/ (kilobytes), merged/ (an ordinary checkpoint),\n"
        "report.json, report.txt and report.png, and model cards with the report. Interrupted, it goes on with\n"
        "--resume from OUT.training, which is gone when OUT is there.",
        "  hf-partial-embed train HuggingFaceTB/SmolLM2-135M tokens.txt data.jsonl out\n"
        "  hf-partial-embed train HuggingFaceTB/SmolLM2-135M data.jsonl out --count 500",
    )  # fmt: skip
    made.add_argument("model", metavar="MODEL", help="folder or Hub repository of the model")
    made.add_argument(
        "tokens", metavar="TOKENS", nargs="?",
        help="text file with a token a line, or a .json file, as for `add`; not with --count",
    )  # fmt: skip
    made.add_argument(
        "data", metavar="DATA",
        help="a text file with a text a line; JSON lines with `text` or `messages`; a folder or Hub id of a data set",
    )  # fmt: skip
    add_out(made)
    whole = {"type": whole_number, "metavar": "N"}
    made.add_argument("--count", help="choose N tokens from DATA", **whole)
    made.add_argument("--split", default="train", metavar="NAME", help="of a data set (default: train)")
    made.add_argument("--column", metavar="NAME", help="field of DATA (default: text, else messages)")
    made.add_argument(
        "--held-out", type=share, default=0.1, metavar="X",
        help="share of the texts that are not trained on but measured; 0 for none (default: 0.1)",
    )  # fmt: skip
    made.add_argument("--special", action="store_true", help="add TOKENS as special tokens")
    made.add_argument(
        "--init", default="auto", metavar="NAME",
        help="initialiser; auto distills with texts from DATA where it can, else takes the mean of the pieces",
    )  # fmt: skip
    made.add_argument("--steps", help="training steps, in place of --epochs; 0 trains none", type=natural, metavar="N")
    made.add_argument("--epochs", type=positive, default=3.0, metavar="X", help="times through DATA (default: 3)")
    made.add_argument(
        "--learning-rate", type=learning_rate, default="auto", metavar="X",
        help="of the rows; auto goes with the size of the old rows, a tenth of it after distillation (default: auto)",
    )  # fmt: skip
    made.add_argument("--batch-size", default=8, help="texts in a step (default: 8)", **whole)
    made.add_argument("--max-length", default=512, help="longer texts are cut in parts (default: 512)", **whole)
    made.add_argument(
        "--elsewhere", metavar="FILE",
        help="texts in which the tokens do not belong, as DATA; with a frozen body (default: those of DATA that have "
        "none of them)",
    )  # fmt: skip
    made.add_argument(
        "--body", choices=("frozen", "lora", "full"), default="frozen",
        help="what becomes of the other weights: nothing, LoRA on all linear layers, or all train (default: frozen)",
    )  # fmt: skip
    made.add_argument(
        "--body-learning-rate", type=positive, metavar="X", help="of lora and full (default: 2e-4 and 2e-5)"
    )
    made.add_argument("--bf16", action="store_true", help="train under bfloat16 autocast")
    made.add_argument("--chunked-loss", action="store_true", help="never hold all logits in training")
    made.add_argument("--frozen-prefix", action="store_true", help="no graph for what comes before a new token")
    made.add_argument(
        "--prefix-cache", type=positive, metavar="GB",
        help="with --frozen-prefix: keep keys and values of it on disk for the next epochs, at most GB gigabytes",
    )  # fmt: skip
    made.add_argument("--save-steps", default=200, help="steps between checkpoints (default: 200)", **whole)
    made.add_argument("--resume", action="store_true", help="go on from the last checkpoint in OUT.training")
    made.add_argument(
        "--seed", type=natural, default=0, metavar="N", help="of split, initialiser and order (default: 0)"
    )
    made.add_argument("--no-picture", action="store_true", help="write no report.png, which needs matplotlib")
    made.add_argument("--push-to-hub", metavar="REPO", help="publish rows/ with its card there")


def _train(options: argparse.Namespace) -> int:
    _check(options)
    tokens = None if options.count else read_tokens(Path(options.tokens))
    data = read_data(options.data, split=options.split, column=options.column)
    elsewhere = options.elsewhere and read_data(options.elsewhere, split=options.split, column=options.column)
    _check_packages(options)
    work = Path(f"{options.out.rstrip('/')}.training")
    with open_work(work, options) as held:
        partial, report, history = _trained(tokens, data, elsewhere or None, work, held, options)
        with fresh_folder(options) as folder:
            _write(folder, partial, report, history, options)
    shutil.rmtree(work, ignore_errors=True)
    url = _pushed(partial, options) if options.push_to_hub else None
    if options.json:
        found_report = None if report is None else report.to_dict()
        return print_json(out=options.out, tokens=dict(zip(partial.tokens, partial.token_ids, strict=True)),
                          report=found_report, url=url)  # fmt: skip
    if report is not None:
        say(f"{report}\n")
    say(f"trained {count(partial.token_ids, 'row')}; saved {options.out}" + (f"; {url}" if url else ""))
    return OK


# ------------------------------------------------------------------------------------- what is found before any work


def _check(options: argparse.Namespace) -> None:
    """Refuse arguments that do not fit, before anything is loaded."""
    if bool(options.count) == bool(options.tokens):
        raise PartialEmbeddingError(
            "Give TOKENS, or --count N to have N tokens chosen from DATA" + (", not both." if options.count else ".")
        )
    if options.special and options.count:
        raise PartialEmbeddingError("--special is for markers that are given in TOKENS; chosen tokens are words.")
    if options.frozen_prefix and options.body != "frozen":
        raise PartialEmbeddingError(f"--frozen-prefix needs a frozen body, not --body {options.body}.")
    if options.prefix_cache and not options.frozen_prefix:
        raise PartialEmbeddingError("--prefix-cache is for the keys and values of --frozen-prefix. Give that, too.")
    if options.elsewhere and options.body != "frozen":
        raise PartialEmbeddingError(f"--elsewhere needs a frozen body, not --body {options.body}.")
    if options.body_learning_rate is not None and options.body == "frozen":
        raise PartialEmbeddingError("--body-learning-rate needs --body lora or full; a frozen body has none.")
    check_out(options)


def _check_packages(options: argparse.Namespace) -> None:
    """Refuse what needs other packages to find out; they take seconds to import."""
    from ..initializers import resolve
    from ..optional import need

    if options.push_to_hub:
        from ..files.hub import check_upload

        check_upload(options.push_to_hub)
    need("accelerate", "train", "train")
    if options.body == "lora":
        need("peft", "train", "--body lora")
    if not options.no_picture and options.held_out:
        need("matplotlib.figure", "plot", "report.png (--no-picture does without it)")
    if options.init != "auto":
        resolve(options.init)
    if options.bf16:
        from transformers import TrainingArguments

        try:
            TrainingArguments(**precision(options))
        except ValueError as error:
            raise PartialEmbeddingError(f"--bf16 cannot be had here: {error}") from error


# ---------------------------------------------------------------------------------------------------- the steps of it


def _trained(
    tokens: list[str] | dict[str, str] | None, data: Texts, elsewhere: Texts | None, work: Path, held: dict[str, Any],
    options: argparse.Namespace,
) -> tuple[PartialEmbedding, EvaluationReport | None, list[dict[str, Any]]]:  # fmt: skip
    """Add, start and train the rows; gives them, the report, and what was logged."""
    from transformers import set_seed

    from ..api import add_tokens
    from ..files.pretrained import load_model, load_tokenizer
    from ..tokens.choosing import choose_tokens

    tokenizer = load_tokenizer(options.model)
    training, held_out = split(data.rendered(tokenizer), options.held_out, options.seed)
    given = elsewhere.rendered(tokenizer) if elsewhere else []
    if tokens is None:
        tokens = held.get("tokens") or list(
            choose_tokens(tokenizer, training, options.count, progress=not options.quiet)
        )
    elif options.steps != 0:
        _check_occur(list(tokens), training)
    model = load_model(options.model)
    if options.body != "full":
        model.requires_grad_(False)
    decided = {"tokens": list(tokens) if options.count else None}
    checkpoint = last_checkpoint(work)
    if checkpoint is None:
        write_work(work, options, **decided)
        partial, distilled = _add(model, tokenizer, tokens, training, options, work / "distilled")
    else:  # whose rows take the place of these
        partial, distilled = add_tokens(model, tokenizer, tokens, special=options.special), held["distilled"]
    write_work(work, options, **decided, distilled=distilled)
    set_seed(options.seed)  # LoRA starts from random numbers
    wrapped = _with_body(partial, options)
    history = run_trainer(wrapped, partial, training, given, data.conversations, checkpoint, distilled, work, options)
    if options.body == "lora":
        wrapped.merge_and_unload()
    return partial, _measure(partial, held_out, options), history


def _check_occur(tokens: list[str], texts: list[str]) -> None:
    """Refuse texts that teach nothing of any token; upper and lower case count as one, as for some tokenizers."""
    wanted = [token.casefold().strip() for token in tokens]
    if not any(token in text.casefold() for text in texts for token in wanted):
        raise PartialEmbeddingError(
            f"None of the tokens {shorten(tokens, 4)} occurs in the {count(texts, 'text')} of DATA to train on, which "
            "would teach their rows nothing. Give texts that have them, written as the tokens are."
        )


def _add(
    model: Any, tokenizer: Any, tokens: Any, texts: list[str], options: argparse.Namespace, unfinished: Path
) -> tuple[PartialEmbedding, bool]:
    """Add the tokens; gives whether their rows are distilled, group by group with a folder for an interrupted run."""
    from ..api import add_tokens
    from ..initializers import Distill

    def add(init: Any) -> PartialEmbedding:
        return add_tokens(model, tokenizer, tokens, init=init, special=options.special, seed=options.seed)

    if options.init not in ("auto", "distill"):
        return add(options.init), False
    try:
        return add(Distill(texts=texts, resume=unfinished, progress=not options.quiet)), True
    except PartialEmbeddingError as error:
        if options.init == "distill":
            raise
        partial = add("subtoken_mean")  # raises what is wrong with the tokens themselves
        logger.warning("The rows start from the mean of their pieces, since they cannot be distilled: %s", error)
        return partial, False


def _with_body(partial: PartialEmbedding, options: argparse.Namespace) -> Any:
    if options.body != "lora":
        return partial.model
    import peft

    model = peft.get_peft_model(partial.model, peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    partial.requires_grad_(True)
    # The Trainer saves the adapter without a word on embeddings, and PEFT then adds whole tables to it.
    model.save_pretrained = functools.partial(  # type: ignore[method-assign]
        model.save_pretrained, save_embedding_layers=False
    )
    return model


def _measure(partial: PartialEmbedding, texts: list[str], options: argparse.Namespace) -> EvaluationReport | None:
    if not texts:
        return None
    from ..evaluation.evaluate import evaluate

    partial.model.eval()
    progress = not options.quiet
    if options.body == "frozen":
        return evaluate(None, partial, texts, progress=progress)
    # The body is another one now: the model before has to be read again.
    return evaluate(options.model, (partial.model, partial.tokenizer), texts, progress=progress)


def _pushed(partial: PartialEmbedding, options: argparse.Namespace) -> str:
    from ..files.hub import upload

    message = f"Upload {count(partial.token_ids, 'token row')}"
    try:
        return upload(
            Path(options.out) / "rows", options.push_to_hub, private=None, token=None, revision=None,
            commit_message=message, create_pr=False,
        )  # fmt: skip
    except PartialEmbeddingError as error:
        raise PartialEmbeddingError(
            f"{error}\nAll is trained and saved in {options.out}: the rows can be published from there, by "
            f"TokenRows.from_pretrained({options.out + '/rows'!r}).push_to_hub({options.push_to_hub!r})."
        ) from error


def _write(
    folder: Path, partial: PartialEmbedding, report: EvaluationReport | None, history: list[dict[str, Any]],
    options: argparse.Namespace,
) -> None:  # fmt: skip
    from ..files.hub import add_to_card, merged_card, write_card

    rows, merged = folder / "rows", folder / "merged"
    partial.token_rows()._save(rows, repo_id=options.push_to_hub or f"{options.out}/rows")
    partial.model.save_pretrained(merged)
    partial.tokenizer.save_pretrained(merged)
    card = merged_card(
        partial.tokens, base_model=options.model, repo_id=f"{options.out}/merged",
        model_class=type(partial.model).__name__, entries=partial.entries,
    )  # fmt: skip
    write_card(merged, card)
    (folder / "training.json").write_text(json.dumps(history, indent=1) + "\n", "utf-8")
    if report is None:
        return
    (folder / "report.json").write_text(report.to_json() + "\n", "utf-8")
    (folder / "report.txt").write_text(f"{report}\n", "utf-8")
    section = f"## Measured\n\nOn texts that were not trained on:\n\n```\n{visible(str(report), keep=chr(10))}\n```\n"
    if not options.no_picture:
        from ..evaluation.plot import plot_report

        plot_report(report, path=folder / "report.png")
        section += "\n![Before and after](report.png)\n"
    for place in (rows, merged):
        if not options.no_picture:
            shutil.copyfile(folder / "report.png", place / "report.png")
        add_to_card(place, section)
