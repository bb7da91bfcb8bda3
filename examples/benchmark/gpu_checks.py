"""What must hold on a GPU as on a CPU: frozen rows keep their bits, and every way to the gradients gives the same.

    python examples/benchmark/gpu_checks.py

Llamas of random weights and two layers, a few seconds each. Prints a line for each check; the exit status is 1 if one
has failed. `--device cpu --shrink 32` tries the script itself where there is no GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch
from measure import machine, peak_bytes
from methods import Shape, build, new_tokens

from hf_partial_embed import ChunkedLoss, FrozenPrefix, PartialEmbedding, add_tokens

STEPS = 20


class Case:
    """A model with new tokens, a batch with them in it, and the bits of its tables."""

    def __init__(self, shape: Shape, device: torch.device, strategy: str = "split") -> None:
        self.model, tokenizer = build(shape, device)
        self.tables = [parameter for name, parameter in self.named_tables()]
        self.before = [table.detach().clone() for table in self.tables]
        self.partial: PartialEmbedding = add_tokens(self.model, tokenizer, new_tokens(shape), strategy=strategy)
        self.start = self.partial.token_rows().input_rows
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, shape.vocabulary, (2, shape.positions), generator=generator)
        half = ids[:, shape.positions // 2 :: 3]  # new tokens in the second half, which the frozen prefix needs
        half.copy_(torch.randint(shape.vocabulary, shape.vocabulary + shape.tokens, half.shape, generator=generator))
        self.ids = ids.to(device)

    def named_tables(self) -> list[tuple[str, torch.nn.Parameter]]:
        names = ("model.embed_tokens.weight", "lm_head.weight")
        return [(name, parameter) for name, parameter in self.model.named_parameters() if name in names]

    def loss(self, run: Any = None) -> torch.Tensor:
        run = self.model if run is None else run
        loss: torch.Tensor = run(input_ids=self.ids, labels=self.ids, use_cache=False).loss
        return loss

    def gradients(self, run: Any = None) -> list[torch.Tensor]:
        return list(torch.autograd.grad(self.loss(run), list(self.partial.parameters())))

    def train(self, forward: Callable[[], torch.Tensor], **options: Any) -> None:
        optimizer = torch.optim.AdamW(self.partial.parameters(), lr=1e-2, weight_decay=0.1, **options)
        self.partial.protect(optimizer)
        losses = []
        for _ in range(STEPS):
            loss = forward()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[-1] < losses[0], f"the loss went from {losses[0]} to {losses[-1]}"
        self.check_bits()

    def check_bits(self) -> None:
        self.partial.verify()
        assert not torch.equal(self.partial.token_rows().input_rows, self.start), "the rows have not moved"
        state = self.model.state_dict()
        for (name, _), before in zip(self.named_tables(), self.before, strict=True):
            assert torch.equal(state[name][: len(before)], before), f"{name} has changed"


def difference(ours: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """The largest relative difference of two lists of gradients."""
    return max(float((a - b).float().norm() / b.float().norm()) for a, b in zip(ours, expected, strict=True))


@contextlib.contextmanager
def compiled_anew() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def checks(shape: Callable[..., Shape], device: torch.device) -> Iterator[tuple[str, Callable[[], str | None]]]:
    """Each check by its name; what it returns is printed with it."""
    fused = {"fused": True}
    for tied in (True, False):
        for strategy in ("split", "mask"):

            def bits(tied: bool = tied, strategy: str = strategy) -> None:
                case = Case(shape(tied=tied, dtype="bfloat16"), device, strategy)
                case.train(case.loss, **fused)

            name = f"bits, bfloat16, fused AdamW, {strategy}, {'tied' if tied else 'untied'}"
            yield name, bits

    def autocast() -> None:
        case = Case(shape(), device)

        def forward() -> torch.Tensor:
            with torch.autocast(device.type, torch.bfloat16):
                return case.loss()

        case.train(forward, **fused)

    yield "bits, float32 under bfloat16 autocast", autocast

    def compiled() -> str:
        case = Case(shape(), device)
        with compiled_anew():
            run = torch.compile(case.model, fullgraph=True)
            found = difference(case.gradients(run), case.gradients())
            assert found < 1e-3, f"gradients differ by {found:.1e}"
            case.train(lambda: case.loss(run), **fused)
        return f"one graph; gradients {found:.0e} apart"

    yield "torch.compile, inductor", compiled

    def chunked() -> str:
        case = Case(shape(), device)
        plain, peak = case.gradients(), peak_bytes(case.gradients, device)
        with ChunkedLoss(case.model):
            found, less = difference(case.gradients(), plain), peak_bytes(case.gradients, device)
        assert found < 1e-3, f"gradients differ by {found:.1e}"
        return f"gradients {found:.0e} apart; peak {peak / 1e6:.1f} to {less / 1e6:.1f} MB"

    yield "chunked loss", chunked

    def prefix() -> str:
        case = Case(shape(), device)
        case.model.train()
        plain = case.gradients()
        with FrozenPrefix(case.model):
            found = difference(case.gradients(), plain)
        assert found < 1e-3, f"gradients differ by {found:.1e}"
        return f"gradients {found:.0e} apart"

    yield "frozen prefix", prefix

    def undone() -> None:
        case = Case(shape(), device)
        case.train(case.loss, **fused)
        case.partial.detach()
        for (name, now), before in zip(case.named_tables(), case.before, strict=True):
            assert torch.equal(now, before), f"{name} has changed"

    yield "detach gives every bit back", undone

    def generates() -> None:
        case = Case(shape(), device)
        prompt = {"input_ids": case.ids, "attention_mask": torch.ones_like(case.ids)}
        options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
        live = case.model.eval().generate(**prompt, **options)
        assert torch.equal(live, case.partial.merge().generate(**prompt, **options)), "merged, it says something else"

    yield "generation is that of the merged model", generates

    if device.type == "cuda" and all(importlib.util.find_spec(name) for name in ("liger_kernel", "triton")):

        def liger() -> str:
            from liger_kernel.transformers import _apply_liger_kernel_to_instance

            case = Case(shape(), device)
            plain = case.gradients()
            _apply_liger_kernel_to_instance(
                case.model.train(), rope=False, rms_norm=False, swiglu=False, cross_entropy=False,
                fused_linear_cross_entropy=True,
            )  # fmt: skip
            found = difference(case.gradients(), plain)
            assert found < 1e-3, f"gradients differ by {found:.1e}"
            return f"gradients {found:.0e} apart"

        yield "Liger's fused loss, its own kernels", liger


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shrink", type=int, default=1, metavar="N", help="divide vocabulary, width and positions")
    parser.add_argument("--leave-out", metavar="TEXT", help="checks with this in their name are not run")
    args = parser.parse_args(argv)
    device = torch.device(args.device)

    def shape(**options: Any) -> Shape:
        return Shape(49152 // args.shrink, 1024 // args.shrink, 100, 512 // args.shrink, layers=2, **options)

    print(", ".join(f"{name} {value}" for name, value in machine(device).items()), flush=True)
    failed = 0
    for name, check in checks(shape, device):
        if args.leave_out and args.leave_out in name:
            continue
        start = time.perf_counter()
        try:
            said = check()
        except Exception:  # noqa: BLE001  # the other checks are run, too
            failed += 1
            print(f"FAILED  {name}\n{traceback.format_exc()}", flush=True)
            continue
        print(f"ok      {name}{f': {said}' if said else ''} ({time.perf_counter() - start:.1f} s)", flush=True)
    print(f"{failed} failed" if failed else "all hold", flush=True)
    return min(failed, 1)


if __name__ == "__main__":
    raise SystemExit(main())
