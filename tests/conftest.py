"""Tiny models and tokenizers of the common kinds, built in memory."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from processes import fresh_process
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

CORPUS = [
    "The elements of the periodic table have names, and every name has a story.",
    "Praseodymium and neodymium are twins; dysprosium is hard to get.",
    "Tools are called by name, and thinking happens before answering.",
    "A model reads tokens, and a token is a piece of a word.",
] * 4
torch.set_num_threads(1)  # the models are so small that threads would only wait for each other

# PEFT 0.21 calls what transformers 5.23 deprecates.
PEFT_WARNING = "ignore:.*gradient_checkpointing.*is deprecated:FutureWarning"

SPECIALS = ["<unk>", "<pad>", "<s>", "</s>"]


def _wrap(backend: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def bpe_tokenizer(size: int = 300) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(vocab_size=size, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False),
    )
    return _wrap(backend)


def wordpiece_tokenizer(size: int = 120) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordPiece(unk_token="<unk>"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=size, special_tokens=SPECIALS, show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    return _wrap(backend)


def cutting_wordpiece() -> PreTrainedTokenizerFast:
    """WordPiece that reads "abcdef" as two pieces, and what is behind "abcd" in it letter by letter."""
    pieces = ["<unk>", "abc", "##def", *"abcdef", *(f"##{letter}" for letter in "abcdef")]
    backend = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


def unigram_tokenizer(size: int = 80) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=size, special_tokens=SPECIALS, unk_token="<unk>", show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    return _wrap(backend)


TOKENIZERS = {"bpe": bpe_tokenizer, "wordpiece": wordpiece_tokenizer, "unigram": unigram_tokenizer}

_SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def _llama(vocab: int, tied: bool, **extra):
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab, num_key_value_heads=2, tie_word_embeddings=tied, pad_token_id=1, **_SMALL, **extra
        )
    )


def _phi(vocab: int, tied: bool):  # a head with a bias
    return PhiForCausalLM(PhiConfig(vocab_size=vocab, tie_word_embeddings=tied, pad_token_id=1, **_SMALL))


def _gemma(vocab: int, tied: bool):  # scaled embeddings
    return Gemma3ForCausalLM(
        Gemma3TextConfig(
            vocab_size=vocab, num_key_value_heads=1, head_dim=8, tie_word_embeddings=tied, pad_token_id=1, **_SMALL
        )
    )


def _gpt2(vocab: int, tied: bool):
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=vocab, n_embd=16, n_layer=2, n_head=2, n_positions=64, tie_word_embeddings=tied,
            bos_token_id=2, eos_token_id=3,
        )
    )  # fmt: skip


def _bert(vocab: int, tied: bool):  # an encoder, with a head bias that is a parameter of its own
    return BertForMaskedLM(BertConfig(vocab_size=vocab, tie_word_embeddings=tied, pad_token_id=1, **_SMALL))


def _bert_encoder(vocab: int, tied: bool):  # no head at all
    return BertModel(BertConfig(vocab_size=vocab, pad_token_id=1, **_SMALL))


def _t5(vocab: int, tied: bool):  # one table under three names
    model = T5ForConditionalGeneration(
        T5Config(
            vocab_size=vocab, d_model=16, d_ff=32, d_kv=8, num_layers=1, num_heads=2,
            decoder_start_token_id=1, pad_token_id=1,
        )
    )  # fmt: skip
    if not tied:  # as from_pretrained leaves a checkpoint that has a head of its own, like Flan-T5's
        model.lm_head.weight = nn.Parameter(torch.randn(vocab, 16))
    return model


MODELS = {
    "llama": _llama, "phi": _phi, "gemma": _gemma, "gpt2": _gpt2, "bert": _bert,
    "bert-encoder": _bert_encoder, "t5": _t5,
}  # fmt: skip


def build_model(kind: str = "llama", vocab: int = 300, *, tied: bool = True, dtype=torch.float32, seed: int = 0):
    """A tiny model in eval mode whose every weight, biases too, is random."""
    torch.manual_seed(seed)
    model = MODELS[kind](vocab, tied).to(dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 and "norm" not in name.lower() and "ln" not in name:
                parameter.uniform_(-0.1, 0.1)
    return model


def run_model(model, ids: torch.Tensor, **options):
    """The model's output over ids, whatever its inputs are called."""
    if model.config.is_encoder_decoder:
        options.setdefault("decoder_input_ids", ids)
    return model(input_ids=ids, **options)


def logits_of(model, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        out = run_model(model, ids)
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


def as_computed_everywhere(model):
    """bitsandbytes has a kernel for some processors that computes in bfloat16, and not in every forward."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def snapshot(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def table_of(model, which: str = "input") -> torch.Tensor:
    module = model.get_input_embeddings() if which == "input" else model.get_output_embeddings()
    return dict(module.named_parameters(recurse=False))["weight"].detach()


# What runs in several processes or compiles takes longest: it begins first, and the other workers have enough to do.
LONGEST = ("test_distributed.py", "test_chunked_loss.py", "test_injected_faults.py", "test_cost.py", "test_hub.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return bpe_tokenizer()


@pytest.fixture(params=["split", "mask"])
def strategy(request) -> str:
    return request.param


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def tied(request) -> bool:
    return request.param


@pytest.fixture(scope="session")
def elsewhere():
    """Runs functions in a process of its own, which may fork."""
    with fresh_process() as run:
        yield run
