"""`distill` and `cached_head`: rows that are fitted by running the model. Through `add_tokens`."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from added import add_tokens
from allocations import Allocations
from conftest import CORPUS, TOKENIZERS, bpe_tokenizer, build_model, snapshot, table_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from hf_partial_embed import PartialEmbeddingError, choose_tokens
from hf_partial_embed.initializers import CachedHead, Distill, InitRequest, distill, snippets
from hf_partial_embed.initializers.head import CachedStates
from hf_partial_embed.initializers.matching import can_reuse, trimmed
from hf_partial_embed.initializers.running import Runner, decoder_layers, undisturbed
from hf_partial_embed.initializers.snippets import _pattern, snippets_of
from hf_partial_embed.tokens.vocabulary import encode_all

TOKENS = [" dysprosium", " story"]
TEXTS = CORPUS[:4] + [f"The {word} of{token} is a {word}." for word in ("name", "token", "word") for token in TOKENS]


def request_of(model, tokenizer, tokens=TOKENS) -> InitRequest:
    return InitRequest(
        table=table_of(model),
        role="input",
        tokens=tokens,
        pieces=encode_all(tokenizer, tokens),
        padding=1,
        model=model,
        tokenizer=tokenizer,
        generator=torch.Generator().manual_seed(0),
    )


def lively(kind="llama", **options):
    """A tiny model with weights so large that its layers matter."""
    model = build_model(kind, **options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "wpe" not in name:  # positions that shift by a piece are no row's fault
                parameter.mul_(8)
    return model


def flags(model):
    return [module.training for module in model.modules()], [p.requires_grad for p in model.parameters()]


def hidden_gap(model, tokenizer, rows, layer) -> float:
    """How far the hidden states with some rows are from those of the original tokenisation."""
    snippets = snippets_of(request_of(model, tokenizer), TEXTS, context=16, limit=8)
    block, runner = decoder_layers(model)[layer - 1], Runner(model, table_of(model))
    gaps = []
    with torch.no_grad():
        for snippet in snippets:
            target = runner.until(block, [snippet.original])[0, snippet.end :]
            made = runner.until(block, [snippet.shortened], rows, [(snippet.start, snippet.token)])[0]
            gaps.append((made[snippet.start :] - target).square().sum().item())
    return sum(gaps)


class TestSnippets:
    @pytest.mark.parametrize("family", list(TOKENIZERS))
    def test_ids_around_the_token_are_those_of_both_tokenisations(self, family):
        tokenizer = TOKENIZERS[family]()
        token = {"bpe": " name", "wordpiece": "hard", "unigram": "▁name"}[family].replace("▁", " ")
        request = request_of(build_model(vocab=len(tokenizer)), tokenizer, [token])
        snippets = snippets_of(request, CORPUS[:4], context=5, limit=3)
        assert 1 <= len(snippets) <= 3
        for snippet in snippets:
            behind = snippet.original[snippet.end + 1 :]
            assert len(behind) == snippet.following <= 5
            assert snippet.shortened[: snippet.start] == snippet.original[: snippet.start]
            assert snippet.shortened[snippet.start + 1 :] == behind
            pieces = tokenizer.decode(snippet.original[snippet.start : snippet.end + 1])
            assert pieces.replace("##", "").strip().startswith(token.strip())

    @settings(max_examples=30, deadline=None)
    @given(st.text("ab .", max_size=30), st.text("ab .", max_size=30), st.integers(1, 8))
    def test_text_of_any_kind(self, before, after, context):
        tokenizer, token = bpe_tokenizer(), "<zq>"
        request = request_of(build_model(), tokenizer, [token])
        whole = tokenizer(before + token + after)["input_ids"]
        try:
            (snippet,) = snippets_of(request, [before + token + after], context=context, limit=1)
        except PartialEmbeddingError:
            assert not before or not after or len(whole) != sum(
                len(tokenizer(part)["input_ids"]) for part in (before, token, after)
            )  # fmt: skip
            return
        assert snippet.start <= context and snippet.following <= context
        assert tokenizer.decode(snippet.original) in before + token + after

    @settings(max_examples=100, deadline=None)
    @given(st.lists(st.text("ab (", min_size=1, max_size=6), min_size=1, max_size=12), st.text("ab (", max_size=40))
    def test_longest_token_at_a_place_is_found(self, tokens, text):
        longest_first = re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))))
        assert _pattern(tokens).findall(text) == longest_first.findall(text)

    def test_token_without_a_text_is_named(self):
        request = request_of(build_model(), bpe_tokenizer(), [" story", " zqx"])
        with pytest.raises(PartialEmbeddingError, match="No text has ' zqx' with something before and behind it"):
            snippets_of(request, TEXTS, context=8, limit=8)

    def test_occurrences_inside_of_longer_words_are_passed_over(self):
        tokenizer = bpe_tokenizer()
        texts = [*["a story of"] * 20, *["the sto is a sto too"] * 2]
        assert (
            tokenizer("the namesake")["input_ids"] != tokenizer("the")["input_ids"] + tokenizer(" name")["input_ids"]
        )
        found = snippets_of(request_of(build_model(), tokenizer, [" sto"]), texts, context=8, limit=3)
        assert len(found) == 3
        assert all(tokenizer.decode(snippet.original[snippet.start : snippet.end + 1]) == " sto" for snippet in found)

    @pytest.mark.parametrize("entry", ["added", "vocabulary"])
    def test_token_that_only_begins_or_ends_texts_has_the_next_one_as_context(self, entry):
        tokens, texts = ["Zqx", " zqk"], ["a story", "Zqx is a story", "a story of zqk", "a story"]
        start, made = (
            add_tokens(lively("llama"), bpe_tokenizer(), tokens, entry=entry, init=init)
            for init in ("subtoken_mean", Distill(texts, layer=1, steps=3))
        )
        at = [made.tokens.index(token) for token in tokens]
        assert (made.token_rows().input_rows != start.token_rows().input_rows)[at].any(1).all()


@pytest.mark.parametrize("tied", [True, False])
def test_a_piece_that_is_only_a_part_of_others_stays_at_the_mean_of_its_pieces(tied):
    texts = [f"({line} Case {n} is a case." for n in range(6) for line in CORPUS[:4]]
    tokens = choose_tokens(bpe_tokenizer(), texts, 8)
    assert 0 in tokens.counts
    mean, fitted = (
        add_tokens(lively("llama", tied=tied), bpe_tokenizer(), tokens, entry="vocabulary", init=init).token_rows()
        for init in ("subtoken_mean", Distill(texts, layer=1, steps=5))
    )
    for before, after in ((mean.input_rows, fitted.input_rows), (mean.output_rows, fitted.output_rows)):
        if before is not None:
            moved = (before != after).any(1).tolist()
            assert moved == [count > 0 for count in tokens.counts]


class TestRunner:
    @pytest.mark.parametrize("kind", ["llama", "phi", "gemma", "gpt2"])
    def test_old_rows_given_as_new_ones_change_nothing(self, kind):
        model = lively(kind)
        runner = Runner(model, table_of(model))
        ids = [[5, 70, 9, 299, 8], [4, 6, 7]]
        block = decoder_layers(model)[0]
        with torch.no_grad():
            expected = runner.until(block, ids)
            masked = [[5, 100, 9, 299, 8], [4, 6, 100]]
            made = runner.until(block, masked, table_of(model)[[70, 7]], [(1, 0), (2, 1)])
        assert torch.allclose(made[0], expected[0], atol=1e-5)
        assert torch.allclose(made[1, :3], expected[1, :3], atol=1e-5)

    @pytest.mark.parametrize("kind", ["llama", "phi", "gemma", "gpt2"])
    def test_texts_that_begin_with_different_numbers_of_ids_run_together(self, kind):
        model = lively(kind)
        request, runner = request_of(model, bpe_tokenizer()), Runner(model, table_of(model))
        found = snippets_of(request, [f"A{TOKENS[0]} is here.", *TEXTS], context=16, limit=8)
        found = sorted((trimmed(snippet, 8) for snippet in found), key=lambda snippet: snippet.start)
        assert found[0].start < found[-1].start
        assert can_reuse(runner, decoder_layers(model)[1], [found[0], found[-1]])
        if kind == "gpt2":  # has a position for each place, which padding shifts
            runner.takes_positions = False
            assert not can_reuse(runner, decoder_layers(model)[1], [found[0], found[-1]])
            assert can_reuse(runner, decoder_layers(model)[1], found[-1:])

    def test_layers_behind_are_not_run(self):
        model, ran = build_model(), []
        first, second = decoder_layers(model)
        for name, module in (("first", first), ("second", second), ("head", model.lm_head)):
            module.register_forward_hook(lambda *_, name=name: ran.append(name))
        add_tokens(model, bpe_tokenizer(), TOKENS, init=Distill(TEXTS, layer=1, steps=2, head_weight=0))
        assert set(ran) == {"first"}


class TestDistill:
    @pytest.mark.parametrize("kind", ["llama", "phi", "gemma", "gpt2"])
    def test_hidden_states_come_near_those_of_the_pieces(self, kind):
        model = lively(kind, tied=False)
        start, done = (
            add_tokens(lively(kind, tied=False), bpe_tokenizer(), TOKENS, init=init).token_rows().input_rows
            for init in ("subtoken_mean", Distill(TEXTS, layer=1, steps=80))
        )
        before, after = (hidden_gap(model, bpe_tokenizer(), rows, 1) for rows in (start, done))
        assert after < 0.6 * before

    @pytest.mark.parametrize("training", [True, False])
    def test_nothing_of_the_model_changes(self, tied, training):
        model = build_model(tied=tied).train(training)
        model.lm_head.weight.requires_grad_(False)
        before, before_flags = snapshot(model), flags(model)
        hooks = [len(module._forward_hooks) for module in model.modules()]
        partial = add_tokens(model, bpe_tokenizer(), TOKENS, init=Distill(TEXTS, steps=3))
        partial.detach()
        assert flags(model) == before_flags
        assert [len(module._forward_hooks) for module in model.modules()] == hooks
        assert all(parameter.grad is None for parameter in model.parameters())
        for name, value in snapshot(model).items():
            assert torch.equal(value, before[name]), name

    def test_flags_come_back_after_an_error(self):
        model = build_model().train()
        before = flags(model)
        with pytest.raises(RuntimeError, match="on purpose"), undisturbed(model):
            assert not model.training and not any(p.requires_grad for p in model.parameters())
            raise RuntimeError("on purpose")
        assert flags(model) == before

    def test_model_writes_its_own_texts_reproducibly(self, tied):
        init = Distill(steps=2, per_token=2, context=6)
        state = torch.random.get_rng_state()
        made = [
            add_tokens(build_model(tied=tied), bpe_tokenizer(), TOKENS, init=init, seed=seed).token_rows()
            for seed in (1, 1, 2)
        ]
        assert torch.equal(torch.random.get_rng_state(), state)
        for name, rows in made[0].tensors().items():
            assert torch.equal(rows, made[1].tensors()[name]), name
        assert not torch.equal(made[0].input_rows, made[2].input_rows)

    def test_model_writes_about_tokens_that_are_in_no_text(self, monkeypatch):
        model, tokenizer, read = build_model(), bpe_tokenizer(), []
        generate = model.generate
        monkeypatch.setattr(model, "generate", lambda **kw: read.extend(kw["input_ids"].tolist()) or generate(**kw))
        add_tokens(model, tokenizer, TOKENS, init=Distill(TEXTS[:1] * 2, steps=1, per_token=4, context=6))
        beginnings = tokenizer.batch_decode(read, skip_special_tokens=True)
        there = [token for token in TOKENS if token in TEXTS[0]]
        assert there and len(beginnings) == 4 * (len(TOKENS) - len(there))
        assert not any(token in text for text in beginnings for token in there)

    def test_texts_are_written_once_for_all_tables(self, monkeypatch):
        model, calls = build_model(tied=False), []
        generate = model.generate
        monkeypatch.setattr(model, "generate", lambda **kw: calls.append(kw) or generate(**kw))
        add_tokens(model, bpe_tokenizer(), ["<zq>"], init=Distill(steps=1, per_token=1, context=6))
        assert len(calls) == 1

    def test_beside_rows_that_are_attached_already(self):
        model, tokenizer = lively(), bpe_tokenizer()
        first = add_tokens(model, tokenizer, TOKENS[:1])
        with torch.no_grad():
            next(first.parameters()).mul_(0.5)
        texts = [f"The{TOKENS[0]} of{TOKENS[1]} is a name."]
        add_tokens(model, tokenizer, TOKENS[1:], init=Distill(texts, steps=2))
        first.verify()

    def test_half_precision(self):
        model = build_model(dtype=torch.bfloat16)
        rows = add_tokens(model, bpe_tokenizer(), TOKENS, init=Distill(TEXTS, steps=3)).token_rows().input_rows
        assert torch.isfinite(rows).all()

    def test_long_rows_of_a_tied_head_are_shortened(self):
        model = build_model()
        longest = table_of(model).norm(dim=1).max()
        init = Distill(TEXTS, steps=40, learning_rate=5.0)
        rows = add_tokens(model, bpe_tokenizer(), TOKENS, init=init).token_rows().input_rows
        assert (rows.norm(dim=1) <= longest * (1 + 1e-5)).all()

    @pytest.mark.parametrize("kind", ["t5", "bert-encoder"])
    def test_model_that_cannot_is_refused_with_a_remedy(self, kind):
        model = build_model(kind)
        before = snapshot(model)
        with pytest.raises(PartialEmbeddingError, match=r"init=('subtoken_mean'|Distill\(texts)"):
            add_tokens(model, bpe_tokenizer(), TOKENS, init="distill")
        assert all(torch.equal(value, before[name]) for name, value in snapshot(model).items())

    def test_layer_that_there_is_not(self):
        with pytest.raises(PartialEmbeddingError, match=r"layer=3\): LlamaForCausalLM has layers 1 to 2"):
            add_tokens(build_model(), bpe_tokenizer(), TOKENS, init=Distill(TEXTS, layer=3))

    def test_embedding_that_is_no_multiple_of_the_row(self):
        model = build_model()
        model.get_input_embeddings().register_forward_hook(lambda _, __, out: out.tanh() + 1)
        with pytest.raises(PartialEmbeddingError, match="makes more of a row than a multiple of it"):
            add_tokens(model, bpe_tokenizer(), TOKENS, init=Distill(TEXTS))


class TestManyTokens:
    """Tokens are taken in groups, whose size is no option: here it is smaller than the number of tokens."""

    WORDS = (" dysprosium", " story", " element", " periodic")

    def rows(self, init, *, tied=True, seed=0):
        tokens = list(self.WORDS)
        return add_tokens(lively(tied=tied), bpe_tokenizer(), tokens, init=init, seed=seed).token_rows().input_rows

    def texts(self):
        return [f"The {word} of{token} is a {word}." for word in ("name", "token", "word") for token in self.WORDS]

    def test_interrupted_and_resumed_is_as_never_interrupted(self, tied, monkeypatch, tmp_path):
        monkeypatch.setattr(snippets, "_TOKENS_AT_ONCE", 1)
        init, whole = Distill(self.texts(), steps=4), distill.Lesson
        expected = self.rows(init, tied=tied)
        taught = []

        def lesson(*args, **options):
            taught.append(1)
            if len(taught) == 3:
                raise KeyboardInterrupt
            return whole(*args, **options)

        monkeypatch.setattr(distill, "Lesson", lesson)
        init = replace(init, resume=tmp_path / "finished")
        with pytest.raises(KeyboardInterrupt):
            self.rows(init, tied=tied)
        assert len(list((tmp_path / "finished").iterdir())) == 2
        assert torch.equal(self.rows(init, tied=tied), expected)
        assert len(taught) == 3 + 2
        assert torch.equal(self.rows(init, tied=tied), expected)
        assert len(taught) == 3 + 2

    def test_what_another_run_or_an_accident_has_left_is_refused(self, monkeypatch, tmp_path):
        monkeypatch.setattr(snippets, "_TOKENS_AT_ONCE", 2)
        init = Distill(self.texts(), steps=1, resume=tmp_path)
        self.rows(init)
        for other in (replace(init, texts=self.texts()[:8]), replace(init, learning_rate=0.2), replace(init, layer=2)):
            with pytest.raises(PartialEmbeddingError, match="another model or for other tokens, texts, settings"):
                self.rows(other)
        with pytest.raises(PartialEmbeddingError, match="another seed"):
            self.rows(init, seed=1)
        path = sorted(tmp_path.iterdir())[1]
        good = path.read_bytes()
        for bad in (good[:-1] + bytes([good[-1] ^ 1]), good[:-4], b""):
            path.write_bytes(bad)
            with pytest.raises(PartialEmbeddingError, match=r"group-00001\.safetensors .*damaged.* to begin anew"):
                self.rows(init)

    def test_the_body_counts_as_the_model(self, tmp_path):
        init = Distill(self.texts(), steps=1, resume=tmp_path)
        self.rows(init)
        model = lively()
        with torch.no_grad():
            next(decoder_layers(model)[0].parameters()).mul_(1.01)
        with pytest.raises(PartialEmbeddingError, match="another model"):
            add_tokens(model, bpe_tokenizer(), list(self.WORDS), init=init)

    def test_the_size_of_a_group_changes_a_row_by_rounding_and_by_the_output_of_its_fellows(self, tied, monkeypatch):
        most = 0.05 if tied else 1e-3
        init, made = Distill(self.texts(), steps=8), []
        start = self.rows("subtoken_mean", tied=tied)
        for size in (1, 4):
            monkeypatch.setattr(snippets, "_TOKENS_AT_ONCE", size)
            made.append(self.rows(init, tied=tied))
        assert (made[0] - made[1]).norm() < most * (made[0] - start).norm()

    def test_memory_does_not_grow_with_the_number_of_tokens(self, monkeypatch):
        monkeypatch.setattr(snippets, "_TOKENS_AT_ONCE", 1)
        largest = []
        for count in (1, 4):
            texts = [text for text in self.texts() if any(word in text for word in self.WORDS[:count])]
            model, tokenizer = lively(), bpe_tokenizer()
            request = request_of(model, tokenizer, list(self.WORDS[:count]))
            with Allocations() as seen:
                Distill(texts, steps=2, batch_size=2)(request)
            largest.append(seen.largest()[0])
        assert largest[1] <= largest[0] * 1.1

    def test_a_step_runs_the_layers_once_for_tokens_whose_texts_begin_with_different_numbers_of_ids(self, monkeypatch):
        ahead = ("The name of", "A")
        texts = [f"{ahead[(n + i) % 2]}{token} is a name." for n in range(2) for i, token in enumerate(self.WORDS)]
        init, ran, rows = Distill(texts, steps=6, layer=1), [], []
        for together in (True, False):
            model = lively()
            decoder_layers(model)[0].register_forward_hook(lambda *_: ran.append(torch.is_grad_enabled()))
            if not together:
                monkeypatch.setattr(distill, "can_reuse", lambda *args: len(args[2]) == 1)
            ran.clear()
            partial = add_tokens(model, bpe_tokenizer(), list(self.WORDS), init=init)
            assert sum(ran) == (6 if together else 12)
            rows.append(partial.token_rows().input_rows)
        assert (rows[0] - rows[1]).norm() < 1e-3 * (rows[1] - self.rows("subtoken_mean")).norm()

    def test_model_without_a_cache_runs_the_whole_text(self, monkeypatch):
        init = Distill(self.texts(), steps=4)
        expected = self.rows(init, tied=False)
        monkeypatch.setattr(Runner, "new_cache", lambda self: None)
        found = self.rows(init, tied=False)
        start = self.rows("subtoken_mean", tied=False)
        assert (found - expected).norm() < 1e-3 * (expected - start).norm()


class TestCachedHead:
    def test_groups_of_tokens_are_fitted_nearly_as_all_at_once(self, monkeypatch):
        made = []
        for size in (1, 64):
            monkeypatch.setattr(snippets, "_TOKENS_AT_ONCE", size)
            made.append(
                add_tokens(lively(tied=False), bpe_tokenizer(), TOKENS, init=CachedHead(TEXTS))
                .token_rows()
                .output_rows
            )
        start = add_tokens(lively(tied=False), bpe_tokenizer(), TOKENS).token_rows().output_rows
        assert (made[0] - made[1]).norm() < 0.3 * (made[1] - start).norm()

    @pytest.mark.parametrize("kind", ["llama", "phi", "gpt2"])
    @pytest.mark.parametrize("frequency", [0.3, 1e-3])
    def test_cached_loss_is_that_of_the_model_with_every_token_as_frequent_as_said(self, kind, frequency):
        model, tokenizer = lively(kind, tied=False), bpe_tokenizer()
        snippets = snippets_of(request_of(model, tokenizer), TEXTS, context=16, limit=8)
        cached = CachedStates.of(model, snippets, 3, frequency)
        partial = add_tokens(model, tokenizer, TOKENS)
        rows = partial.token_rows()
        bias = None if rows.output_bias is None else rows.output_bias.double()
        losses: dict[int, list[torch.Tensor]] = {-1: [], 0: [], 1: []}
        for snippet in snippets:
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([snippet.original])).logits[0, :-1]
            labels = torch.tensor(snippet.original[1:])
            labels[snippet.start - 1] = partial.token_ids[snippet.token]
            kept = [i for i in range(len(labels)) if not snippet.start <= i < snippet.end]
            sums = logits[:, :300].logsumexp(-1)
            new = labels >= 300
            # What the loss of an old label is without new tokens does not depend on the rows.
            fixed = torch.where(new, 0.0, sums - logits.gather(1, labels[:, None])[:, 0])
            positions = F.cross_entropy(logits, labels, reduction="none") - fixed
            losses[-1] += positions[[i for i in kept if not new[i]]]
            losses[snippet.token] += positions[new]
        means = {which: torch.stack(values).mean().item() for which, values in losses.items()}
        expected = means[-1] + frequency * (means[0] + means[1])
        assert cached.loss(rows.output_rows.double(), bias).item() == pytest.approx(expected, abs=1e-5)

    def test_rows_are_the_optimum(self):
        model, tokenizer = lively(tied=False), bpe_tokenizer()
        start = add_tokens(lively(tied=False), bpe_tokenizer(), TOKENS).token_rows().output_rows.double()
        init = CachedHead(TEXTS)
        partial = add_tokens(model, tokenizer, TOKENS, init=init)
        found = partial.token_rows().output_rows.double()
        partial.detach()
        snippets = snippets_of(request_of(model, tokenizer), TEXTS, context=16, limit=8)
        cached = CachedStates.of(model, snippets, 12, 2e-4)
        penalty = init.penalty * cached.states.square().mean()
        objective = lambda rows: (cached.loss(rows, None) + penalty * (rows - start).square().sum() / 2).item()  # noqa: E731
        assert objective(found) < objective(start)
        generator = torch.Generator().manual_seed(1)
        for size in (1e-3, 1e-1):
            for _ in range(10):
                step = size * torch.randn(found.shape, generator=generator, dtype=torch.float64)
                assert objective(found + step) > objective(found)

    def test_rarer_tokens_are_proposed_less(self):
        model, shares = lively(tied=False), []
        ids = torch.tensor(encode_all(bpe_tokenizer(), [CORPUS[0]]))
        for frequency in (0.1, 1e-3):
            init = CachedHead(TEXTS, frequency=frequency, penalty=1e-5)
            partial = add_tokens(model, bpe_tokenizer(), TOKENS, init=init)
            with torch.no_grad():
                logits = model(input_ids=ids).logits
            shares.append(logits.softmax(-1)[..., partial.token_ids].sum().item())
            partial.detach()
        assert shares[1] < shares[0] / 2

    def test_many_tokens_are_as_frequent_together_as_a_hundred(self, tied):
        tokens = [f"<{number}>" for number in range(125)]
        texts = [f"a story of {token} is a story" for token in tokens]
        default, given, other = (
            add_tokens(lively(tied=tied), bpe_tokenizer(), tokens, init=init).token_rows()
            for init in (Distill(texts, layer=1, steps=2, frequency=each) for each in (None, 0.02 / 125, 2e-4))
        )
        attribute = "input_rows" if tied else "output_rows"
        assert torch.equal(getattr(default, attribute), getattr(given, attribute))
        assert not torch.equal(getattr(default, attribute), getattr(other, attribute))

    def test_input_rows_and_tied_rows_stay_the_mean_of_the_pieces(self, tied):
        made, expected = (
            add_tokens(build_model(tied=tied), bpe_tokenizer(), TOKENS, init=init).token_rows().input_rows
            for init in (CachedHead(TEXTS), "subtoken_mean")
        )
        assert torch.equal(made, expected)

    def test_head_of_a_distilled_token_is_fitted_too(self):
        made = [
            add_tokens(build_model(tied=False), bpe_tokenizer(), TOKENS, init=init).token_rows().output_rows
            for init in (Distill(TEXTS, steps=1), CachedHead(TEXTS))
        ]
        assert torch.equal(*made)
