"""What training new token rows costs: this package against full training, a mask, PEFT and the frozen limit.

One command prints all tables and writes them as JSON and as a picture. Times are medians of ratios within one run
in which the ways take turns, on a CPU of processor time, which other processes hardly lengthen; bytes are counted at
every allocation; peaks are the allocator's. It runs on a CPU, or with the same command on a GPU where there is one,
with larger shapes. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # _assets, which all examples share

import adding
import evaluating
import sections
from _assets import load_smollm2, needed_for_smollm2, require
from measure import machine
from methods import Shape
from tqdm import tqdm

SECTIONS = [
    "training", "parts", "rows", "vocabulary", "loss", "prefix", "batches", "adding", "many",
    "saving", "generating", "compiled", "evaluating",
]  # fmt: skip
SMOLLM2 = ["prefix", "evaluating"]  # on a real model
LARGE = "large"  # tables of models with billions of parameters, for a GPU; not among the default ones


def shapes(section: str, on_gpu: bool, tokens: int, shrink: int = 1) -> list[Shape]:
    """What a section is measured on. Smollm2: 49152×576; Qwen2: 151936×896; Llama 3: 128256×4096."""
    if section == LARGE:
        # Llama 3 8B, Qwen3 8B, Gemma 2 2B.
        sizes = [(128256, 4096, False), (151936, 4096, False), (262144, 2304, True)]
        return [
            Shape(number // shrink, width // shrink, tokens, long // shrink, tied=tied, dtype="bfloat16")
            for number, width, tied in sizes
            for long in (2048, 8192)
        ]
    positions = 8192 if on_gpu else 128
    small = Shape(49152, 576, tokens, positions)
    qwen = Shape(151936, 896, tokens, positions // 2)
    llama = Shape(128256, 4096, tokens, positions, tied=False, dtype="bfloat16")
    if section == "training":
        found = [small, Shape(49152, 576, tokens, positions, tied=False), qwen]
        found.append(llama if on_gpu else Shape(49152, 576, tokens, positions, dtype="bfloat16"))
        return found
    if section == "rows":
        return [Shape(49152, 576, number, positions) for number in (1024, 32768)]
    if section == "vocabulary":
        return [Shape(number, 256, tokens, positions) for number in (32000, 256000)]
    if section == "loss":
        long = 8192 if on_gpu else 512
        found = [Shape(49152, 576, tokens, long), Shape(151936, 896, tokens, long // 4)]
        return [*found, llama] if on_gpu else [*found, Shape(49152, 576, tokens, long, dtype="bfloat16")]
    if section == "adding":
        sizes = [(151936, 896), (64000, 512)]
        return [Shape(*size, tokens, 1, dtype=dtype) for size in sizes for dtype in ("float32", "bfloat16")]
    if section == "many":
        return [Shape(8192, 64, number, 1, layers=1) for number in (5000, 20000, 65536)]
    if section == "saving":
        return [Shape(151936, 896, tokens, 1)]
    if section == "parts":
        return [small, qwen]
    if section == "batches":
        return [Shape(1000, 16, tokens, 256, layers=1)]
    if section == "compiled":
        return [Shape(8192, 256, tokens, 64, layers=1)]
    return [Shape(49152, 576, tokens, positions, layers=2)]  # generating


MEASURES = {
    "training": sections.training, "parts": sections.parts, "rows": sections.training, "vocabulary": sections.training,
    "loss": sections.loss, "adding": adding.few, "many": adding.many, "saving": sections.saving,
    "generating": sections.generating, "compiled": sections.compiled,
    "batches": sections.batches, LARGE: sections.large,
}  # fmt: skip


def print_table(title: str, rows: list[dict[str, Any]]) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row))
    print(f"\n### {title}\n", flush=True)
    print("| " + " | ".join(names) + " |")
    print("| " + " | ".join("---" if isinstance(rows[0].get(name), str) else "---:" for name in names) + " |")
    for row in rows:
        print("| " + " | ".join(_cell(row.get(name)) for name in names) + " |")


def _cell(value: Any) -> str:
    if value is None:
        return "–"  # noqa: RUF001
    if isinstance(value, float):
        return f"{value:.2f}" if value == 0 or abs(value) >= 0.01 else f"{value:.1e}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Step time and allocated bytes of each method, for each shape of the first section."""
    from matplotlib.figure import Figure

    found = [result for result in results if result["section"] == "training"]
    figure = Figure(figsize=(10, 2.2 + 1.1 * len(found)), layout="constrained")
    columns = {
        "forward+backward": "forward and backward, ratio to the frozen limit",
        "MB allocated beyond": "MB beyond it",
    }
    for axes, (column, label) in zip(figure.subplots(1, 2), columns.items(), strict=True):
        for number, method in enumerate(row["method"] for row in found[0]["rows"] if "trainable" in row):
            values = [next(row[column] for row in result["rows"] if row["method"] == method) for result in found]
            places = [place + number * 0.16 for place in range(len(found))]
            axes.barh(places, values, height=0.15, label=method)
        axes.set_yticks(
            [place + 0.32 for place in range(len(found))], [result["shape"] for result in found], fontsize=7
        )
        axes.invert_yaxis()
        axes.set_xlabel(label)
    figure.axes[1].set_yticks([])
    figure.axes[1].set_xscale("symlog", linthresh=1)
    figure.axes[0].legend(fontsize=7)
    figure.savefig(path, dpi=120)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--sections", nargs="+", default=SECTIONS, choices=[*SECTIONS, LARGE], help="default: all but large"
    )
    parser.add_argument(
        "--shrink", type=int, default=1, metavar="N", help="divide the sizes of section large, to try it on a CPU"
    )
    parser.add_argument("--tokens", type=int, default=100, help="new tokens (default: %(default)s)")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument(
        "--prefix-positions", type=int, default=2048, help="of the SmolLM2 batch (default: %(default)s)"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--smollm2", type=Path, default=Path("outputs/smollm2"), help="as in examples/quickstart.py")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmark"), help="folder for JSON and picture")
    args = parser.parse_args(argv)
    needed = ["peft", "matplotlib", *(needed_for_smollm2(args.smollm2) if {*SMOLLM2} & {*args.sections} else [])]
    require(needed)
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    args.output.mkdir(parents=True, exist_ok=True)

    date = datetime.date.today().isoformat()
    path = args.output / f"{date}-{device.type}.json"
    # Sections can be run one by one: what is in the file from other ones of this day stays.
    results: list[dict[str, Any]] = json.loads(path.read_text())["results"] if path.is_file() else []
    for section in tqdm(args.sections, desc="sections"):
        results = [result for result in results if result["section"] != section]
        jobs = [None] if section in SMOLLM2 else shapes(section, device.type == "cuda", args.tokens, args.shrink)
        for shape in jobs:
            if shape is None:
                model, tokenizer = load_smollm2(args.smollm2)
                model.to(device)
                if section == "prefix":
                    title = f"SmolLM2-135M, {args.prefix_positions} positions, first new token in the middle"
                    rows = sections.prefix(model, tokenizer, args.prefix_positions, device, args.repetitions)
                else:
                    title = f"SmolLM2-135M, {args.tokens} words of several pieces, prose of Python's manual"
                    rows = evaluating.evaluating(model, tokenizer, device, args.repetitions, tokens=args.tokens)
            else:
                title, rows = str(shape), MEASURES[section](shape, device, args.repetitions)
            print_table(f"{section}: {title}", rows)
            settings = {"repetitions": args.repetitions, "tokens": args.tokens, **machine(device)}
            results.append({"section": section, "shape": title, "settings": settings, "rows": rows})
            path.write_text(json.dumps({"date": date, "results": results}, indent=1) + "\n")
    if any(result["section"] == "training" for result in results):
        plot(results, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
