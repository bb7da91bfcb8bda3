"""What is measured: one function for each table, which gives its rows."""

from __future__ import annotations

import contextlib
import copy
import gc
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial as partial_call
from typing import Any

import torch
import torch.nn.functional as F
from measure import allocated_bytes, kept_bytes, multiplications, peak_bytes, time_ratios
from methods import COUNTED, FROZEN, METHODS, Prepared, Shape, build, new_tokens, prepare, saved_bytes
from torch import nn
from torch.utils.data import RandomSampler
from transformers.trainer_pt_utils import LengthGroupedSampler

from hf_partial_embed import ChunkedLoss, FrozenPrefix, PrefixCache, SplitLinear, add_tokens, linear_cross_entropy

Rows = list[dict[str, Any]]


def _step(prepared: Prepared, ids: torch.Tensor, optimizer: torch.optim.Optimizer | None) -> None:
    """Forward and backward; with the optimizer's step where there is one."""
    prepared.model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    if optimizer is not None:
        optimizer.step()
    for parameter in prepared.parameters:
        parameter.grad = None


def large(shape: Shape, device: torch.device, repetitions: int) -> Rows:
    """`training` for tables of several GB, of which no checkpoint is written; seconds and peaks beside the ratios."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return training(shape, device, repetitions, save=False)


def _needed_by_rows(
    shape: Shape, device: torch.device
) -> tuple[Callable[[], list[torch.Tensor]], Callable[[list[torch.Tensor]], None]]:
    """What rows that train cannot do without, beyond a frozen table: their gradient, and the optimizer's step.

    The gradient is one matmul of the logits' gradient and the hidden states, with the lookup's rows added to it; where
    the head is not tied, the lookup has one of its own.
    """
    size, dtype = shape.vocabulary + shape.tokens, getattr(torch, shape.dtype)
    grad = torch.randn(shape.positions, size, device=device, dtype=dtype)[:, shape.vocabulary :]
    states = torch.randn(shape.positions, shape.width, device=device, dtype=dtype)
    row = torch.randint(0, shape.tokens, (shape.positions,), device=device)
    rows = [torch.zeros(shape.tokens, shape.width, device=device, requires_grad=True) for _ in range(2 - shape.tied)]
    optimizer = torch.optim.AdamW(rows, lr=1e-3, fused=True)

    def gradients() -> list[torch.Tensor]:
        found = [(grad.t() @ states).float()]
        if not shape.tied:
            found.append(torch.zeros_like(found[0]))
        found[-1].index_add_(0, row, states.float())
        return found

    def update(gradients: list[torch.Tensor]) -> None:
        for parameter, gradient in zip(rows, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
        optimizer.zero_grad()

    return gradients, update


def training(shape: Shape, device: torch.device, repetitions: int, *, save: bool = True) -> Rows:
    """A training step by each method: forward and backward, and with AdamW's step, fused.

    One row is no method: the frozen limit, and by hand the operations that no rows can do without.
    """
    ids = torch.randint(0, shape.vocabulary + shape.tokens, (1, shape.positions), device=device)
    passes: dict[str, Callable[[], object]] = {}
    steps: dict[str, Callable[[], object]] = {}
    rows: Rows = []
    for method in METHODS:
        prepared = prepare(method, shape, device)
        parameters = prepared.parameters
        optimizer = torch.optim.AdamW(parameters, lr=1e-3, fused=True) if parameters else None
        prepared.protect(optimizer)
        passes[method] = lambda prepared=prepared: _step(prepared, ids, None)  # type: ignore[misc]
        steps[method] = lambda prepared=prepared, optimizer=optimizer: _step(prepared, ids, optimizer)  # type: ignore[misc]
        rows.append({
            "method": method,
            "trainable": sum(parameter.numel() for parameter in parameters),
            "saved MB": saved_bytes(prepared.save) / 1e6 if save and method != FROZEN else None,
        })  # fmt: skip
    gradients, update = _needed_by_rows(shape, device)
    passes[COUNTED] = lambda: (passes[FROZEN](), gradients())
    steps[COUNTED] = lambda: (passes[FROZEN](), update(gradients()))
    rows.insert(1, {"method": COUNTED})
    for row in rows:
        method = row["method"]
        steps[method]()  # the optimizer's state is made in the first step
        row["MB allocated"] = allocated_bytes(passes[method]) / 1e6
        row["peak MB"] = peak_bytes(passes[method], device) / 1e6
        row["peak MB of a step"] = peak_bytes(steps[method], device) / 1e6
        row["GFLOP"] = 2 * multiplications(passes[method]) / 1e9
    limit = rows[0]["MB allocated"]
    pass_times = time_ratios(passes, repetitions, device, FROZEN)
    step_times = time_ratios(steps, repetitions, device, FROZEN)
    for row in rows:
        row["MB allocated beyond"] = row.pop("MB allocated") - limit
        row["forward+backward"] = pass_times[row["method"]]["ratio"]
        row["step"] = step_times[row["method"]]["ratio"]
        row["step, milliseconds"] = 1000 * step_times[row["method"]]["seconds"]
    return rows


def parts(shape: Shape, device: torch.device, repetitions: int) -> Rows:
    """The embedding alone and the head alone, forward and backward."""
    ids = torch.randint(0, shape.vocabulary + shape.tokens, (1, shape.positions), device=device)
    dtype = getattr(torch, shape.dtype)
    states = torch.randn(1, shape.positions, shape.width, device=device, dtype=dtype, requires_grad=True)
    embedding: dict[str, Callable[[], object]] = {}
    head: dict[str, Callable[[], object]] = {}
    rows: Rows = []
    for method in (FROZEN, "split", "PEFT TrainableTokens"):
        prepared = prepare(method, shape, device)

        def passes(part: nn.Module, value: torch.Tensor, trained: list[nn.Parameter]) -> None:
            output = part(value)
            output.backward(torch.ones_like(output))
            for parameter in trained:
                parameter.grad = None

        model, trained = prepared.model, prepared.parameters
        embedding[method] = partial_call(passes, model.get_input_embeddings(), ids, trained)
        head[method] = partial_call(passes, model.get_output_embeddings(), states, trained)
        rows.append({
            "method": method,
            "embedding MB allocated": allocated_bytes(embedding[method]) / 1e6,
            "head MB allocated": allocated_bytes(head[method]) / 1e6,
        })  # fmt: skip
    for name, ways in (("embedding", embedding), ("head", head)):
        times = time_ratios(ways, repetitions, device, "split")
        for row in rows:
            row[f"{name}, ratio to split"] = times[row["method"]]["ratio"]
    return rows


def saving(shape: Shape, device: torch.device, repetitions: int) -> Rows:
    """Saving the rows, and the merged checkpoint: seconds, and the memory that it takes beyond the model's."""
    model, tokenizer = build(shape, device)
    partial = add_tokens(model, tokenizer, new_tokens(shape))
    rows: Rows = []
    size = sum(parameter.nbytes for parameter in model.parameters())
    for name, save in (("rows", partial.save_pretrained), ("merged checkpoint", model.save_pretrained)):
        with tempfile.TemporaryDirectory() as folder:
            save(folder)
            seconds = []
            for _ in range(repetitions):
                start = time.perf_counter()
                save(folder)
                seconds.append(time.perf_counter() - start)
            rows.append({
                "what": name,
                "milliseconds": 1000 * sorted(seconds)[len(seconds) // 2],
                "MB beyond the model": allocated_bytes(partial_call(save, folder)) / 1e6,
                "MB of the model": size / 1e6,
            })  # fmt: skip
    return rows


def loss(shape: Shape, device: torch.device, repetitions: int) -> Rows:
    """Head and cross-entropy, forward and backward: the plain loss and the chunked one."""
    torch.manual_seed(0)
    size, dtype = shape.vocabulary + shape.tokens, getattr(torch, shape.dtype)
    linear = nn.Linear(shape.width, size, bias=False, device=device, dtype=dtype)
    ids = range(shape.vocabulary, size)
    head = SplitLinear(linear, trainable_ids=ids, base_size=shape.vocabulary, dtype=torch.float32)
    hidden = torch.randn(shape.positions, shape.width, device=device, dtype=dtype, requires_grad=True)
    target = torch.randint(0, size, (shape.positions,), device=device)

    def plain(hidden: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(head(hidden).float(), target)

    def chunked(hidden: torch.Tensor) -> torch.Tensor:
        return linear_cross_entropy(hidden, head, target)

    losses: dict[str, Any] = {"plain": plain, "chunked": chunked}
    for name, function in (("plain, compiled", plain), ("chunked, compiled", chunked)):
        losses[name] = torch.compile(function, fullgraph=True)
    ways: dict[str, Callable[[], object]] = {
        name: (lambda function=function: function(hidden).backward()) for name, function in losses.items()
    }
    times = time_ratios(ways, repetitions, device, "plain")
    rows: Rows = []
    for name, way in ways.items():
        hidden.grad = None
        for parameter in head.parameters():
            parameter.grad = None
        rows.append({"loss": name, "forward+backward": times[name]["ratio"], "peak MB": peak_bytes(way, device) / 1e6})
    return rows


def prefix(model: Any, tokenizer: Any, positions: int, device: torch.device, repetitions: int) -> Rows:
    """A real model with the first new token at half of its positions: with and without a graph before it, and kept."""
    partial = add_tokens(model.requires_grad_(False), tokenizer, [f"<new{number}>" for number in range(100)])
    model.train()
    torch.manual_seed(0)
    ids = torch.randint(10, partial.token_ids[0], (1, positions), device=device)
    new = ids[0, positions // 2 :: 16]
    new.copy_(torch.randint(partial.token_ids[0], partial.token_ids[-1] + 1, new.shape))
    keeping, kept = copy.deepcopy((model, partial))  # a model of its own, since what is kept goes with the addition
    cache = PrefixCache()
    additions: dict[str, tuple[Any, Any, list[Any]]] = {
        "split": (model, partial, []),
        "frozen prefix": (model, partial, [FrozenPrefix(model)]),
        "chunked loss": (model, partial, [ChunkedLoss(model)]),
        "both": (model, partial, [FrozenPrefix(model), ChunkedLoss(model)]),
        "kept prefix": (keeping, kept, []),
        "kept prefix, chunked loss": (keeping, kept, [ChunkedLoss(keeping)]),
    }

    @contextlib.contextmanager
    def on(name: str) -> Iterator[Any]:
        with contextlib.ExitStack() as stack:
            for addition in additions[name][2]:
                stack.enter_context(addition)
            yield additions[name][0]

    def gradients(name: str) -> list[torch.Tensor]:
        with on(name) as own:
            loss = own(input_ids=ids, labels=ids).loss
            return list(torch.autograd.grad(loss, list(additions[name][1].parameters())))

    def backward(name: str) -> None:  # the counter cannot see through torch.autograd.grad
        with on(name) as own:
            own(input_ids=ids, labels=ids).loss.backward()
        for parameter in additions[name][1].parameters():
            parameter.grad = None

    with FrozenPrefix(keeping, cache):
        gradients("kept prefix")  # the first epoch
        expected, table = gradients("split"), []
        for name in additions:
            gradients_here = gradients(name)
            error = max(float((a - b).norm() / b.norm()) for a, b in zip(gradients_here, expected, strict=True))
            with on(name) as own:
                kept_here = kept_bytes(lambda own=own: own(input_ids=ids, labels=ids).loss, own)
            table.append({
                "way": name, "activation MB": kept_here / 1e6, "gradient, relative difference": error,
                "multiplications": multiplications(partial_call(backward, name)),
            })  # fmt: skip
        ways = {name: (lambda name=name: gradients(name)) for name in additions}
        times = time_ratios(ways, repetitions, device, "split")
        plain = dict(table[0])
        for row in table:
            row["step"] = times[row["way"]]["ratio"]
            row["activation memory"] = row["activation MB"] / plain["activation MB"]
            row["multiplications"] /= plain["multiplications"]
            row["cache MB"] = cache.bytes / 1e6 if row["way"].startswith("kept") else 0.0
    partial.detach()
    return table


def batches(shape: Shape, device: torch.device, repetitions: int) -> Rows:
    """How many positions run through the layers, by how texts are put together to batches.

    Texts of equal length, in which the first new token is anywhere, and a quarter without one.
    """
    model, tokenizer = build(shape, device)
    partial = add_tokens(model, tokenizer, new_tokens(shape))
    torch.manual_seed(0)
    texts = torch.randint(0, shape.vocabulary, (512, shape.positions), device=device)
    first = torch.randint(0, shape.positions * 4 // 3, (len(texts),)).clamp(max=shape.positions)
    for row, place in zip(texts, first.tolist(), strict=True):
        row[place::8] = partial.token_ids[0]
    size = 8
    samplers: dict[str, Any] = {
        "shuffled": RandomSampler(range(len(texts))),
        "sorted by the first new token": LengthGroupedSampler(size, lengths=first.tolist()),
    }
    forward = {True: 0, False: 0}  # positions, by whether there is a graph

    def count(module: nn.Module, args: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        forward[hidden.requires_grad] += hidden.shape[0] * hidden.shape[1]

    handle = model.model.layers[0].register_forward_hook(count)
    rows: Rows = []
    for name, sampler in samplers.items():
        for kept in (False, True):
            with FrozenPrefix(model, PrefixCache() if kept else None):
                model(input_ids=texts[:size])  # tried out here, if it is not
                for epoch in (1, 2):
                    forward.update({True: 0, False: 0})
                    for chosen in torch.tensor(list(sampler)).split(size):
                        model(input_ids=texts[chosen])
                    if kept or epoch == 1:
                        rows.append({
                            "batches": name,
                            "prefix": f"kept, epoch {epoch}" if kept else "each time",
                            "forward": sum(forward.values()) / texts.numel(),
                            "backward": forward[True] / texts.numel(),
                        })  # fmt: skip
    handle.remove()
    return rows


@torch.no_grad()
def generating(shape: Shape, device: torch.device, repetitions: int) -> Rows:
    """Greedy generation of 16 tokens: merged, rows attached, and PEFT with its adapter attached."""
    split = prepare("split", shape, device).model.eval()
    merged, tokenizer = build(shape, device)
    merged = add_tokens(merged, tokenizer, new_tokens(shape)).merge().eval()
    peft = prepare("PEFT TrainableTokens", shape, device).model.eval()
    ids = torch.randint(10, shape.vocabulary, (1, 32), device=device)
    options = {"max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False, "pad_token_id": 0}
    ways = {
        name: (lambda model=model: model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options))
        for name, model in {"merged": merged, "split": split, "PEFT TrainableTokens": peft}.items()
    }
    times = time_ratios(ways, repetitions, device, "merged")
    return [{"model": name, "ratio": times[name]["ratio"]} for name in ways]


def compiled(shape: Shape, device: torch.device, repetitions: int) -> Rows:
    """`torch.compile(fullgraph=True, dynamic=True)`, forward and backward over three batch shapes."""
    batches = [torch.randint(0, shape.vocabulary, (2, shape.positions + extra), device=device) for extra in (0, 3, 8)]
    ways: dict[str, Callable[[], object]] = {}
    rows: Rows = []
    for method in (FROZEN, "split"):
        torch._dynamo.utils.counters.clear()
        prepared = prepare("split", shape, device)
        if method == FROZEN:
            prepared.model.requires_grad_(False)
        model = torch.compile(prepared.model, fullgraph=True, dynamic=True)

        def run(model: Any = model, prepared: Prepared = prepared, frozen: bool = method == FROZEN) -> None:
            for ids in batches:
                inputs = {"input_ids": ids}
                if frozen:  # the backward runs all the way to the hidden states, as it does with rows
                    inputs = {"inputs_embeds": prepared.model.get_input_embeddings()(ids).detach().requires_grad_()}
                model(**inputs, labels=ids, use_cache=False).loss.backward()
            for parameter in prepared.parameters:
                parameter.grad = None

        run()
        rows.append({"model": method, "graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"]})
        ways[method] = run
    times = time_ratios(ways, repetitions, device, FROZEN)
    for row in rows:
        row["forward+backward"] = times[row["model"]]["ratio"]
    return rows
