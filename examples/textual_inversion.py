"""A concept of several vectors in two CLIP text encoders, to a file for diffusers and back.

The encoders have a tiny configuration and random weights, so that it runs anywhere in seconds; with those of Stable
Diffusion XL (`pipe.text_encoder`, `pipe.text_encoder_2` and their tokenizers) every line is the same. The loss here
pulls the concept towards a description, where textual inversion would take the denoising loss.

    python examples/textual_inversion.py --out cat.safetensors
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import pre_tokenizers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from hf_partial_embed import TokenRows, add_tokens
from hf_partial_embed.formats import read_textual_inversion, write_textual_inversion
from hf_partial_embed.tokens import expand_placeholders, vector_tokens

PLACEHOLDER, NUM_VECTORS, WIDTHS = "<cat>", 3, {"clip_l": 32, "clip_g": 64}


def tiny_tokenizer() -> CLIPTokenizer:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: number for number, word in enumerate(words)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], bos_token="<|startoftext|>", eos_token="<|endoftext|>")


def tiny_encoder(width: int, size: int) -> CLIPTextModel:
    torch.manual_seed(width)
    config = CLIPTextConfig(
        vocab_size=size, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2, num_attention_heads=2,
        bos_token_id=size - 2, eos_token_id=size - 1, pad_token_id=size - 1,
    )  # fmt: skip
    return CLIPTextModel(config).requires_grad_(False)


def learn(encoder: CLIPTextModel, tokenizer: CLIPTokenizer, steps: int) -> TokenRows:
    tokens = vector_tokens(PLACEHOLDER, NUM_VECTORS)
    partial = add_tokens(encoder, tokenizer, dict.fromkeys(tokens, "cat"))
    expand_placeholders(tokenizer, tokens)  # whoever writes <cat> gets all three
    ids = torch.tensor([tokenizer(f"a photo of {PLACEHOLDER}")["input_ids"]])
    with torch.no_grad():
        goal = encoder(input_ids=torch.tensor([tokenizer("a photo of a grey toy")["input_ids"]])).pooler_output
    optimizer = torch.optim.AdamW(partial.param_groups(lr=1e-2))
    for step in range(steps):
        loss = (encoder(input_ids=ids).pooler_output - goal).pow(2).mean()
        if step in (0, steps - 1):
            print(f"  step {step:3d}: loss {loss.item():.4f}")
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    partial.verify()
    return partial.token_rows()


def main(arguments: list[str] | None = None) -> dict[str, tuple[int, ...]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("cat.safetensors"))
    parser.add_argument("--steps", type=int, default=30)
    options = parser.parse_args(arguments)
    rows = {}
    for name, width in WIDTHS.items():
        print(name)
        tokenizer = tiny_tokenizer()
        rows[name] = learn(tiny_encoder(width, len(tokenizer)), tokenizer, options.steps)
    write_textual_inversion(rows, options.out)
    shapes = {name: tuple(vectors.shape) for name, vectors in load_file(options.out).items()}
    print(f"{options.out}: {shapes}")
    for name, before in rows.items():
        again = read_textual_inversion(options.out, token=PLACEHOLDER, encoder=name)
        assert torch.equal(again.input_rows, before.input_rows)
    return shapes


if __name__ == "__main__":
    main()
