"""What training K new token rows costs by each method, on one model of random weights.

Methods: full fine-tuning of the embeddings, a gradient mask, PEFT's TrainableTokens, this package's split,
and a model whose embeddings are frozen altogether, which is the limit. The body is frozen in all of them.
Time is the median over repetitions in which the methods take turns; bytes are counted at every allocation of
a training step; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_partial_embed import add_tokens


class AllocatedBytes(TorchDispatchMode):
    """Counts the bytes of every storage that an operator makes."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def storages(tree: Any) -> dict[int, int]:
            tensors = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
            return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}

        known = storages((args, kwargs or {}))
        out = func(*args, **(kwargs or {}))
        self.total += sum(size for pointer, size in storages(out).items() if pointer not in known)
        return out


def build(args: argparse.Namespace) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """A Llama of the asked-for size whose body is frozen, and a tokenizer of as many words."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=args.vocabulary, hidden_size=args.width, intermediate_size=2 * args.width,
        num_hidden_layers=args.layers, num_attention_heads=4, tie_word_embeddings=not args.untied,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(getattr(torch, args.dtype)).requires_grad_(False)
    words = {f"word{number}": number for number in range(args.vocabulary)}
    backend = Tokenizer(models.WordLevel(words, unk_token="word0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return model, PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="word0")


def prepare(method: str, args: argparse.Namespace) -> tuple[Any, list[torch.nn.Parameter], Callable[[Any], None], Any]:
    """The model as a method prepares it, what it trains, its protection, and what saves its result."""
    model, tokenizer = build(args)
    tokens = [f"<new{number}>" for number in range(args.tokens)]
    protect: Callable[[Any], None] = lambda optimizer: None  # noqa: E731
    if method in ("split", "mask"):
        partial = add_tokens(model, tokenizer, tokens, strategy=method)
        return model, list(partial.parameters()), partial.protect, partial.save_pretrained
    model.resize_token_embeddings(args.vocabulary + args.tokens, mean_resizing=False)
    model.requires_grad_(False)
    if method == "PEFT TrainableTokens":
        from peft import TrainableTokensConfig, get_peft_model

        new = list(range(args.vocabulary, args.vocabulary + args.tokens))
        targets = ["embed_tokens", "lm_head"] if args.untied else ["embed_tokens"]
        model = get_peft_model(model, TrainableTokensConfig(token_indices=new, target_modules=targets))
    elif method == "full":
        model.get_input_embeddings().requires_grad_(True)
        model.get_output_embeddings().requires_grad_(True)
    return model, [p for p in model.parameters() if p.requires_grad], protect, model.save_pretrained


def train_step(model: Any, optimizer: torch.optim.Optimizer | None, ids: torch.Tensor) -> None:
    hidden = model(input_ids=ids).logits.flatten(0, 1)
    if optimizer is None:  # the frozen limit still sends a gradient through head and body
        hidden.requires_grad_(True) if not hidden.requires_grad else None
    F.cross_entropy(hidden, ids.flatten()).backward()
    if optimizer is not None:
        optimizer.step()
        optimizer.zero_grad()


def frozen_limit(args: argparse.Namespace) -> Any:
    """A frozen model whose first hidden states require a gradient, so that the backward runs all the way."""
    model, _ = build(args)
    model.resize_token_embeddings(args.vocabulary + args.tokens, mean_resizing=False)
    model.requires_grad_(False)
    model.enable_input_require_grads()
    return model


def folder_bytes(save: Callable[[Any], None]) -> int:
    with tempfile.TemporaryDirectory() as name:
        save(name)
        return sum(path.stat().st_size for path in Path(name).rglob("*.safetensors"))


METHODS = ["frozen limit", "split", "PEFT TrainableTokens", "mask", "full"]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=49152, help="rows of the table before (default: SmolLM2's)")
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--layers", type=int, default=2, help="layers of the body (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=100, help="new tokens (default: %(default)s)")
    parser.add_argument("--positions", type=int, default=256, help="tokens of a batch (default: %(default)s)")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--untied", action="store_true", help="a head of its own")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)

    ids = torch.randint(0, args.vocabulary + args.tokens, (1, args.positions))
    runs: dict[str, tuple[Any, torch.optim.Optimizer | None]] = {}
    rows: dict[str, dict[str, float]] = {}
    for method in METHODS:
        if method == "frozen limit":
            model, parameters, size = frozen_limit(args), [], 0
            optimizer = None
        else:
            model, parameters, protect, save = prepare(method, args)
            optimizer = torch.optim.AdamW(parameters, lr=1e-3)
            protect(optimizer)
            size = folder_bytes(model.save_pretrained if method in ("full", "mask") else save)
        train_step(model, optimizer, ids)  # the optimizer's state is made in the first step
        with AllocatedBytes() as counted:
            train_step(model, optimizer, ids)
        runs[method] = (model, optimizer)
        rows[method] = {
            "trainable": sum(p.numel() for p in parameters),
            "bytes per step": counted.total,
            "saved bytes": size,
        }
    times: dict[str, list[float]] = {method: [] for method in METHODS}
    for _ in tqdm(range(args.repetitions), desc="repetitions"):
        for method, (model, optimizer) in runs.items():
            start = time.perf_counter()
            train_step(model, optimizer, ids)
            times[method].append(time.perf_counter() - start)
    limit = rows["frozen limit"]["bytes per step"]
    print(
        f"\nvocabulary {args.vocabulary}, width {args.width}, {args.layers} layers, {args.tokens} new tokens, "
        f"{'untied' if args.untied else 'tied'}, {args.dtype}, batch of {args.positions} tokens\n"
    )
    print("| method | trainable numbers | step, ratio to the limit | MB allocated beyond it | saved MB |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for method in METHODS:
        ratios = [own / base for own, base in zip(times[method], times["frozen limit"], strict=True)]
        row = rows[method]
        row["step ratio"] = statistics.median(ratios)
        saved = f"{row['saved bytes'] / 1e6:.2f}" if row["saved bytes"] else "–"  # noqa: RUF001
        print(
            f"| {method} | {row['trainable']:,} | {row['step ratio']:.2f} | "
            f"{(row['bytes per step'] - limit) / 1e6:.1f} | {saved} |"
        )
    if args.json:
        args.json.write_text(
            json.dumps({"settings": {k: str(v) for k, v in vars(args).items()}, "rows": rows}, indent=2)
        )


if __name__ == "__main__":
    main()
