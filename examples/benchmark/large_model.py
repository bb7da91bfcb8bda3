"""Models of more than a billion parameters from end to end, and the memory of each stage as the system measures it.

    python examples/benchmark/large_model.py --size 1.5b
    python examples/benchmark/large_model.py --size 7b --offload --steps 3

The weights are random and the shapes those of Qwen2.5 1.5B (tied) and Llama 2 7B; the checkpoint is written layer by
layer, in shards of at most 1 GB. Then, each in a process of its own: `train` loads it in bfloat16, adds 100 tokens
whose rows are float32, trains with gradient checkpointing in a Trainer, and saves rows and the merged checkpoint;
`load` puts the saved rows on the base; `verify` compares base and merged checkpoint piece by piece. With `--offload`
the layers stay on the disk, and are read for each forward and backward.

For each moment the table has the peak of the process's memory so far (`VmHWM`), and that of the part that is no file's
(`RssAnon`, looked at every 20 ms). Pages of the checkpoint that were read count in the first, though the system takes
them back when it needs memory. What the process had before it loaded the model is taken off both.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from methods import word_tokenizer
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from hf_partial_embed import PartialEmbeddingCallback, add_tokens, load_tokens, verify_checkpoint

SIZES = {
    "tiny": {"vocab_size": 2048, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "1.5b": {"vocab_size": 151936, "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
             "num_attention_heads": 12, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "7b": {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
           "num_attention_heads": 32, "num_key_value_heads": 32, "tie_word_embeddings": False},
}  # fmt: skip
SHARD = 1 << 30
TOKENS = [f"<new{number}>" for number in range(100)]


def memory(kind: str) -> int:
    """Bytes of this process, as Linux counts them: `VmHWM` for the most that it has had."""
    # Not `ru_maxrss`, which a process takes over from the one that started it.
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(kind):
            return int(line.split()[1]) * 1024
    raise SystemExit("This script reads /proc/self/status, which Linux has.")


def peak() -> int:
    """Bytes that this process has had in memory at most."""
    return memory("VmHWM")


class Anonymous(threading.Thread):
    """Looks how much memory the process has that is no file's, and keeps the most."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most = memory("RssAnon")

    def run(self) -> None:
        while True:
            self.most = max(self.most, memory("RssAnon"))
            time.sleep(0.02)


def write_base(folder: Path, size: str) -> int:
    """Write a checkpoint of random bfloat16 weights tensor by tensor; returns the bytes of its tensors."""
    config = LlamaConfig(**SIZES[size], max_position_embeddings=2048, dtype="bfloat16")
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(0)
    folder.mkdir(parents=True)
    shards: list[dict[str, torch.Tensor]] = [{}]
    where: dict[str, str] = {}
    total = filled = 0

    def flush() -> None:
        name = f"model-{len(shards):05}.safetensors"
        save_file(shards[-1], folder / name, metadata={"format": "pt"})
        where.update(dict.fromkeys(shards[-1], name))
        shards[-1] = {}
        shards.append({})

    # Drawn once, since seven billion draws take a quarter of an hour; each tensor begins at another place.
    drawn = torch.empty(1 << 24).normal_(std=0.02, generator=generator).to(torch.bfloat16)
    for name, parameter in tqdm(list(model.named_parameters()), desc="writing the base"):
        value = torch.ones(parameter.shape, dtype=torch.bfloat16)
        if parameter.dim() > 1:
            first = int(torch.randint(len(drawn), (1,), generator=generator))
            times = 1 + (first + value.numel()) // len(drawn)
            value = drawn.repeat(times)[first : first + value.numel()].view(parameter.shape).clone()
        if filled + 2 * value.numel() > SHARD and shards[-1]:
            flush()
            filled = 0
        shards[-1][name] = value
        filled += 2 * value.numel()
        total += 2 * value.numel()
    flush()
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.save_pretrained(folder)
    word_tokenizer(config.vocab_size).save_pretrained(folder)
    return total


def load(folder: Path, offload: Path | None) -> tuple[Any, Any]:
    options: dict[str, Any] = {}
    if offload is not None:
        layers = json.loads((folder / "config.json").read_text())["num_hidden_layers"]
        places = {f"model.layers.{number}": "disk" for number in range(layers)}
        places |= {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
        options = {"device_map": places, "offload_folder": str(offload)}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **options)
    return model, AutoTokenizer.from_pretrained(folder)


def batches(ids: list[int], steps: int, positions: int) -> list[dict[str, list[int]]]:
    """Sequences with a new token at every fourth place."""
    generator = torch.Generator().manual_seed(0)
    sequences = torch.randint(1, min(ids), (steps, positions), generator=generator)
    sequences[:, ::4] = torch.tensor(ids)[torch.randint(len(ids), sequences[:, ::4].shape, generator=generator)]
    return [{"input_ids": row, "labels": row} for row in sequences.tolist()]


def train(base: Path, out: Path, args: argparse.Namespace) -> Iterator[tuple[str, str]]:
    from transformers import Trainer, TrainingArguments

    model, tokenizer = load(base, out / "offload" if args.offload else None)
    model.requires_grad_(False)
    yield "loaded", ""
    partial = add_tokens(model, tokenizer, TOKENS, special=True)
    yield "100 tokens added", ""
    data = batches(partial.token_ids, args.steps, args.positions)
    arguments = TrainingArguments(
        str(out / "trainer"), max_steps=args.steps, per_device_train_batch_size=1, learning_rate=1e-3, bf16=True,
        gradient_checkpointing=not args.offload, save_strategy="no", report_to=[], logging_steps=1, disable_tqdm=False,
        dataloader_pin_memory=False, use_cpu=True,
    )  # fmt: skip
    callback = PartialEmbeddingCallback(partial, learning_rate=1e-3, chunked_loss=not args.offload)
    if args.offload:  # a Trainer refuses a model with layers on the disk
        optimizer = torch.optim.AdamW(partial.parameters(), lr=1e-3)
        losses = []
        for item in tqdm(data, desc="steps"):
            loss = model(**{name: torch.tensor([row]) for name, row in item.items()}).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    else:
        trainer = Trainer(model=model, args=arguments, train_dataset=data, callbacks=[callback])
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    partial.verify()
    yield f"{args.steps} steps of {args.positions} positions", f"loss {losses[0]:.2f} to {losses[-1]:.2f}"
    partial.save_pretrained(out / "rows")
    yield "rows saved", ""
    model.save_pretrained(out / "merged", max_shard_size=SHARD)
    tokenizer.save_pretrained(out / "merged")
    yield "merged checkpoint saved", ""


def load_rows(base: Path, out: Path, args: argparse.Namespace) -> Iterator[tuple[str, str]]:
    model, tokenizer = load(base, out / "offload2" if args.offload else None)
    yield "loaded", ""
    partial = load_tokens(model, tokenizer, out / "rows", trainable=False)
    yield "saved rows loaded", f"{len(partial.token_ids)} rows"


def verify(base: Path, out: Path, args: argparse.Namespace) -> Iterator[tuple[str, str]]:
    report = verify_checkpoint(base, out / "merged")
    assert not (report.changed or report.missing or report.unexpected or report.changed_ids), str(report)
    yield "compared with the base", f"{report.compared} tensors, nothing else differs"


STAGES: dict[str, Callable[..., Iterator[tuple[str, str]]]] = {"train": train, "load": load_rows, "verify": verify}


def run_stage(stage: str, base: Path, args: argparse.Namespace) -> None:
    start, before = time.perf_counter(), peak()
    anonymous = Anonymous()
    own = anonymous.most
    anonymous.start()
    for moment, said in STAGES[stage](base, args.output, args):
        line = {
            "stage": stage, "moment": moment, "seconds": time.perf_counter() - start, "peak": peak() - before,
            "anonymous": anonymous.most - own, "said": said,
        }  # fmt: skip
        print(json.dumps(line), flush=True)


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    """Run all stages; returns the lines of the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="1.5b")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--positions", type=int, default=64)
    parser.add_argument("--offload", action="store_true", help="leave the layers on the disk")
    parser.add_argument("--output", type=Path, help="folder for the checkpoints (default: one that is removed)")
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.stage:
        run_stage(args.stage, args.output / "base", args)
        return []
    with tempfile.TemporaryDirectory() as name:
        out = args.output or Path(name)
        size = write_base(out / "base", args.size)
        print(f"base: {size / 1e9:.2f} GB in bfloat16")
        print("\n| stage | moment | seconds | peak GB | of the model | no file's, GB | of the model | |")
        print("| --- | --- | ---: | ---: | ---: | ---: | ---: | --- |")
        lines: list[dict[str, Any]] = []
        for stage in STAGES:
            command = [sys.executable, __file__, "--stage", stage, "--output", str(out), "--size", args.size]
            command += ["--steps", str(args.steps), "--positions", str(args.positions)]
            command += ["--offload"] if args.offload else []
            result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            found = [json.loads(line) for line in result.stdout.splitlines() if line.startswith('{"stage"')]
            for line in found:
                print(
                    f"| {line['stage']} | {line['moment']} | {line['seconds']:.0f} | {line['peak'] / 1e9:.2f} | "
                    f"{line['peak'] / size:.2f} | {line['anonymous'] / 1e9:.2f} | {line['anonymous'] / size:.2f} | "
                    f"{line['said']} |",
                    flush=True,
                )
            lines += found
    return lines


if __name__ == "__main__":
    main()
