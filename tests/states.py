"""Everything about a tokenizer or a model that an error, or a detach, must leave as it was."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path

import torch
from conftest import CORPUS, TOKENIZERS
from transformers import ByT5Tokenizer, EsmTokenizer
from transformers.models.bert.tokenization_bert_legacy import BertTokenizerLegacy

TEXTS = [*CORPUS[:4], "", " ", "Ünïcode ﬁ ① 文字 \u200b\n\t", "<s> <think>x</think> zinc ZINC  zinc"]


def tokenizer_state(tokenizer) -> dict[str, object]:
    """What two tokenizers share if they are the same, files and encodings included."""
    state: dict[str, object] = {}
    if tokenizer.is_fast:
        state["backend"] = tokenizer._tokenizer.to_str()
        state["splits special"] = tokenizer._tokenizer.encode_special_tokens
    else:
        state["decoder"] = {token_id: repr(token) for token_id, token in tokenizer._added_tokens_decoder.items()}
        state["encoder"] = dict(tokenizer._added_tokens_encoder)
        state["trie"] = (set(tokenizer.tokens_trie._tokens), copy.deepcopy(tokenizer.tokens_trie.data))
        state["cached size"] = tokenizer.total_vocab_size
    state["extra"] = [repr(token) for token in tokenizer._extra_special_tokens]
    state["specials"] = (repr(tokenizer.special_tokens_map), list(tokenizer.all_special_tokens))
    state["sizes"] = (len(tokenizer), tokenizer.vocab_size)
    state["attributes"] = sorted(vars(tokenizer))
    state["init_kwargs"] = repr(tokenizer.init_kwargs)
    other = copy.deepcopy(tokenizer)  # a call changes the backend's settings
    state["vocabulary"] = dict(other.get_vocab())
    state["encodings"] = [other(text)["input_ids"] for text in TEXTS]
    state["decoded"] = [other.decode(ids, skip_special_tokens=True) for ids in state["encodings"]]
    with tempfile.TemporaryDirectory() as folder:
        other.save_pretrained(folder)
        state["files"] = {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}
    return state


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def model_state(model) -> dict[str, object]:
    """What two models share if they are the same, to the bit."""
    modules = dict(model.named_modules())
    return {
        "bits": {name: (tuple(value.shape), value.dtype, bits(value)) for name, value in model.state_dict().items()},
        "trains": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "parameters": {name: id(value) for name, value in model.named_parameters(remove_duplicate=False)},
        "classes": {name: type(module) for name, module in modules.items()},
        "attributes": {name: sorted(vars(module)) for name, module in modules.items()},
        "hooks": {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in modules.items()},
        "values": {
            name: {key: value for key, value in vars(module).items() if isinstance(value, (bool, int, float, str))}
            for name, module in modules.items()
        },
        "config": model.config.to_dict(),
        "sizes": {
            name: (getattr(m, "num_embeddings", 0), getattr(m, "out_features", 0)) for name, m in modules.items()
        },
    }


def assert_same(before: dict[str, object], after: dict[str, object]) -> None:
    for key in before:
        assert after[key] == before[key], key


def byt5_tokenizer() -> ByT5Tokenizer:
    """Pure Python, no normaliser: every byte is a token."""
    return ByT5Tokenizer(extra_ids=0)


def _vocabulary_file(tokens: list[str]) -> str:
    with tempfile.NamedTemporaryFile("w", suffix=".txt", delete=False, encoding="utf-8") as file:
        file.write("\n".join(tokens))
    return file.name


def bert_legacy_tokenizer() -> BertTokenizerLegacy:
    """Pure Python, lower-casing: letters and a few words."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{x}" for x in letters), "the", "name", "."]
    path = _vocabulary_file(tokens)
    try:
        return BertTokenizerLegacy(path)
    finally:
        Path(path).unlink()


def esm_tokenizer() -> EsmTokenizer:
    """Pure Python, splits text at every token of its vocabulary."""
    path = _vocabulary_file(["<cls>", "<pad>", "<eos>", "<unk>", *"LAGVSERTIDPKQNFYMHWC", "<mask>"])
    try:
        return EsmTokenizer(path)
    finally:
        Path(path).unlink()


SLOW_TOKENIZERS = {"byt5": byt5_tokenizer, "bert-legacy": bert_legacy_tokenizer}
ALL_TOKENIZERS = {**TOKENIZERS, **SLOW_TOKENIZERS}
