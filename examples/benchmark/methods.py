"""The methods that are compared, each on one model of random weights with a frozen body."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_partial_embed import add_tokens

FROZEN = "frozen limit"
COUNTED = "frozen and what rows need"
METHODS = [FROZEN, "split", "PEFT TrainableTokens", "mask", "full"]


@dataclass(frozen=True)
class Shape:
    """Sizes of a model: `vocabulary` rows before `tokens` are added, `width`, and so on."""

    vocabulary: int
    width: int
    tokens: int
    positions: int
    tied: bool = True
    dtype: str = "float32"
    layers: int = 0

    def __str__(self) -> str:
        tied, layers = "tied" if self.tied else "untied", f", {self.layers} layers" if self.layers else ""
        return (
            f"{self.vocabulary}×{self.width}, {tied}, {self.dtype}, {self.tokens} new tokens, "
            f"{self.positions} positions{layers}"
        )


@dataclass
class Prepared:
    """A model as one method trains it."""

    model: Any
    parameters: list[torch.nn.Parameter]
    protect: Callable[[Any], None]
    save: Callable[[Any], object]


def build(shape: Shape, device: torch.device) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """A Llama whose body is frozen (without layers: embedding, norm and head), and a tokenizer of as many words."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape.vocabulary, hidden_size=shape.width, intermediate_size=2 * shape.width,
        num_hidden_layers=shape.layers, num_attention_heads=4, tie_word_embeddings=shape.tied,
    )  # fmt: skip
    with device:
        model = LlamaForCausalLM(config).to(getattr(torch, shape.dtype)).requires_grad_(False)
    return model, word_tokenizer(shape.vocabulary)


def word_tokenizer(size: int) -> PreTrainedTokenizerFast:
    """A tokenizer of the words `word0`, `word1`, ..."""
    words = {f"word{number}": number for number in range(size)}
    backend = Tokenizer(models.WordLevel(words, unk_token="word0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="word0", pad_token="word0")


def new_tokens(shape: Shape) -> dict[str, str]:
    """Tokens with descriptions of two words, so that each row starts at a mean of pieces."""
    return {f"<new{number}>": f"word{number + 1} word{number + 2}" for number in range(shape.tokens)}


def prepare(method: str, shape: Shape, device: torch.device) -> Prepared:
    """The model as a method prepares it, what it trains, its protection, and what saves its result."""
    model, tokenizer = build(shape, device)
    protect: Callable[[Any], None] = lambda optimizer: None  # noqa: E731
    if method in ("split", "mask"):
        partial = add_tokens(model, tokenizer, new_tokens(shape), strategy=method)
        save = partial.save_pretrained if method == "split" else model.save_pretrained
        return Prepared(model, list(partial.parameters()), partial.protect, save)
    model.resize_token_embeddings(shape.vocabulary + shape.tokens, mean_resizing=False)
    model.requires_grad_(False)
    if method == FROZEN:  # its hidden states require a gradient, so that the backward runs all the way
        model.enable_input_require_grads()
    elif method == "PEFT TrainableTokens":
        from peft import TrainableTokensConfig, get_peft_model

        new = list(range(shape.vocabulary, shape.vocabulary + shape.tokens))
        targets = ["embed_tokens"] if shape.tied else ["embed_tokens", "lm_head"]
        model = get_peft_model(model, TrainableTokensConfig(token_indices=new, target_modules=targets))
    elif method == "full":
        model.get_input_embeddings().requires_grad_(True)
        model.get_output_embeddings().requires_grad_(True)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return Prepared(model, parameters, protect, model.save_pretrained)


def saved_bytes(save: Callable[[Any], object]) -> int:
    with tempfile.TemporaryDirectory() as name:
        save(name)
        return sum(path.stat().st_size for path in Path(name).rglob("*.safetensors"))
