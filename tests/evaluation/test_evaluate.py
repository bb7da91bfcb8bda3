"""Before and after: figures against sums computed here, one live model against a base loaded alone, planted faults."""

from __future__ import annotations

import gc
import json
import math
from copy import deepcopy
from itertools import combinations

import pytest
import torch
from conftest import CORPUS, bpe_tokenizer, build_model, snapshot, table_of, unigram_tokenizer, wordpiece_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from hf_partial_embed import PartialEmbeddingError, TokenRows, add_tokens, evaluate, train_tokens
from hf_partial_embed.evaluation import EvaluationReport, plot_report
from hf_partial_embed.evaluation.states import HeadStates
from hf_partial_embed.tokens import reading
from hf_partial_embed.tokens.reading import TextReader

WORDS = [" praseodymium", "<think>", " neodymium", " tokens"]
TEXTS = [
    "The praseodymium is hard to get, and <think> neodymium tokens.",
    "A model reads words, and a piece of a word.",
    "Tools are called <think> by name; praseodymium thinks before answering é☃.",
    "The elements of the periodic table",
]


def words(texts=WORDS):
    return [AddedToken(text, normalized=False) for text in texts]


def setup(kind="llama", *, tied=True, strategy="split", tokens=WORDS, noise=0.3, seed=0):
    """A model with rows that are not what they started as."""
    tokenizer = bpe_tokenizer()
    model = build_model(kind, len(tokenizer), tied=tied)
    partial = add_tokens(model, tokenizer, words(tokens), strategy=strategy)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in partial.parameters():
            rows = parameter if strategy == "split" else parameter[partial.token_ids]
            changed = rows + noise * torch.randn_like(rows)
            if strategy == "split":
                parameter.copy_(changed)
            else:
                parameter[partial.token_ids] = changed
    return model, tokenizer, partial


def run(partial, texts=TEXTS, **options):
    return partial.evaluate(texts, progress=False, **options)


def spans_of(tokenizer, ids):
    """Character spans of ids that decode one by one, as here."""
    spans, start = [], 0
    for token_id in ids:
        end = start + len(tokenizer.decode([token_id]))
        spans.append((start, end))
        start = end
    return spans


@torch.no_grad()
def nats_of(model, ids, prefix, outputs=None):
    """A plain loop: one forward for a text, one log-softmax."""
    logits = model(torch.tensor([[prefix, *ids]])).logits[0, :-1].double()
    logits = logits if outputs is None else logits[:, :outputs]
    return [-logits[place].log_softmax(0)[token_id].item() for place, token_id in enumerate(ids)]


def plain_figures(model, tokenizer, base_tokenizer, texts, new, base_size):
    """Bits per byte of the whole, of the new tokens, of what follows, from spans of ASCII texts."""
    sums = {side: {part: [0.0, 0] for part in ("all", "new", "following")} for side in ("before", "after")}
    for text in texts:
        readings = {
            "before": base_tokenizer(text, add_special_tokens=False)["input_ids"],
            "after": tokenizer(text, add_special_tokens=False)["input_ids"],
        }
        after = list(zip(readings["after"], spans_of(tokenizer, readings["after"]), strict=True))
        own = [span for token_id, span in after if token_id in new]
        for side, ids in readings.items():
            nats = nats_of(model, ids, 2, base_size if side == "before" else None)
            for value, (start, end) in zip(nats, spans_of(tokenizer, ids), strict=True):
                inside = any(a <= start and end <= b for a, b in own)
                parts = ["all", *(["new"] if inside else ["following"] if own and start >= own[0][1] else [])]
                for part in parts:
                    sums[side][part][0] += value
                    sums[side][part][1] += end - start
    return {
        part: {side: sums[side][part][0] / math.log(2) / sums[side][part][1] for side in sums}
        for part in ("all", "new", "following")
    }


class TestFigures:
    @pytest.mark.parametrize("kind", ["llama", "phi", "gemma", "gpt2"])
    def test_bits_per_byte_are_the_sum_over_a_plain_log_softmax(self, kind, tied, strategy):
        texts = [text.encode("ascii", "ignore").decode() for text in TEXTS]
        model, tokenizer, partial = setup(kind, tied=tied, strategy=strategy)
        report = run(partial, texts)
        expected = plain_figures(model.eval(), tokenizer, bpe_tokenizer(), texts, partial.token_ids, 300)
        for part, value in (
            ("all", report.bits_per_byte),
            ("new", report.bits_per_byte_new),
            ("following", report.bits_per_byte_following),
        ):
            assert vars(value) == pytest.approx(expected[part], rel=2e-5), part

    def test_counts_leak_and_perplexity(self):
        model, tokenizer, partial = setup()
        report = run(partial).to_dict()
        base = bpe_tokenizer()
        before, after = (
            [len(ids) for ids in reader(TEXTS, add_special_tokens=False)["input_ids"]] for reader in (base, tokenizer)
        )
        assert report["tokens"] == {"before": sum(before), "after": sum(after)}
        assert report["saving"] == pytest.approx(1 - sum(after) / sum(before))
        assert report["bytes"] == len("".join(TEXTS).encode())
        assert report["texts"] == 4 and report["texts_with_new"] == 2 and report["occurrences"] == 6
        plain, mass, count = [], 0.0, 0
        for text in (TEXTS[1], TEXTS[3]):
            ids = base(text, add_special_tokens=False)["input_ids"]
            plain += [b - a for a, b in zip(nats_of(model, ids, 2, 300), nats_of(model, ids, 2), strict=True)]
            with torch.no_grad():
                mass += model(torch.tensor([[2, *ids]])).logits[0, :-1].softmax(1)[:, partial.token_ids].sum().item()
            count += len(ids)
        assert report["leak"] == pytest.approx(mass / count, rel=1e-4)
        assert report["perplexity_change"] == pytest.approx(math.expm1(sum(plain) / count), rel=1e-3)

    def test_divergence_rank_and_adoption_of_one_occurrence(self):
        model, _tokenizer, partial = setup(tokens=[" praseodymium"])
        base = bpe_tokenizer()
        lead, name, rest = "The", " praseodymium", " is hard"
        report = run(partial, [lead + name + rest])
        ids = {text: base(text, add_special_tokens=False)["input_ids"] for text in (lead, name, rest)}
        with torch.no_grad():
            before = model(torch.tensor([[2, *ids[lead], *ids[name], *ids[rest]]])).logits[0].double()
            after = model(torch.tensor([[2, *ids[lead], 300, *ids[rest]]])).logits[0].double()
        old = before[:, :300].log_softmax(1)
        new = after[:, :300].log_softmax(1)
        start, shorter = 1 + len(ids[lead]) + len(ids[name]), 2 + len(ids[lead])
        places = range(len(ids[rest]))
        kl = [(old[start + i - 1].exp() * (old[start + i - 1] - new[shorter + i - 1])).sum().item() for i in places]
        assert report.kl == pytest.approx(sum(kl) / len(kl), rel=1e-3)
        (token,) = report.per_token
        here = after[len(ids[lead])].log_softmax(0)
        assert token.loss == pytest.approx(-here[300].item(), rel=1e-4)
        assert token.rank == 1 + (here > here[300]).sum().item()
        pieces = here[ids[name][0]].item()
        pieces += sum(old[len(ids[lead]) + i, piece].item() for i, piece in enumerate(ids[name][1:], 1))
        assert token.adoption == pytest.approx(1 / (1 + math.exp(pieces - here[300].item())), rel=1e-3)
        assert token.kl == report.kl and report.adoption == token.adoption

    def test_a_token_across_the_border_is_split_as_its_bytes_are(self):
        model, tokenizer, partial = setup(tokens=["elements"])  # base reads " e" across the token's start
        report = run(partial, ["The elements"])
        ids = bpe_tokenizer()("The elements")["input_ids"]
        nats = nats_of(model, ids, 2, 300)
        own = 0.0
        for value, (start, end) in zip(nats, spans_of(tokenizer, ids), strict=True):
            own += value * max(0, end - max(start, 4)) / (end - start)
        assert report.bits_per_byte_new.before == pytest.approx(own / math.log(2) / len("elements"), rel=1e-4)

    def test_without_bos_and_eos_the_first_token_is_not_scored(self):
        _, tokenizer, partial = setup()
        scored = run(partial, ["The elements"]).bits_per_byte.before
        tokenizer.bos_token = None
        nats = nats_of(partial.model, (ids := bpe_tokenizer()("The elements")["input_ids"]), 3, 300)
        assert run(partial, ["The elements"]).bits_per_byte.before == pytest.approx(
            sum(nats) / math.log(2) / 12, rel=1e-4
        )
        tokenizer.eos_token = None
        report = run(partial, ["The elements"])
        with torch.no_grad():
            logits = partial.model(torch.tensor([ids])).logits[0, :, :300].double().log_softmax(1)
        nats = [-logits[place, token_id].item() for place, token_id in enumerate(ids[1:])]
        left = 12 - len(tokenizer.decode(ids[:1]))
        assert report.bits_per_byte.before == pytest.approx(sum(nats) / math.log(2) / left, rel=1e-4)
        assert report.bits_per_byte.before != pytest.approx(scored, rel=1e-6)

    @pytest.mark.parametrize(("length", "stride"), [(8, 1), (8, 7), (16, 5), (64, 32)])
    def test_windows_score_each_token_once_with_the_stride_as_context(self, length, stride):
        model, _tokenizer, partial = setup("gpt2")
        text = " ".join(CORPUS[:4])
        ids = [2, *bpe_tokenizer()(text)["input_ids"]]
        nats, first, start = 0.0, 1, 0
        while first < len(ids):
            window = ids[start : start + length]
            with torch.no_grad():
                logits = model(torch.tensor([window])).logits[0, :, :300].double().log_softmax(1)
            for place in range(first, start + len(window)):
                nats -= logits[place - start - 1, ids[place]].item()
            first = start + len(window)
            start = first - stride
        report = run(partial, [text], max_length=length, stride=stride)
        assert report.bits_per_byte.before == pytest.approx(nats / math.log(2) / len(text), rel=1e-4)
        assert report.max_length == length and report.stride == stride

    def test_windows_that_hold_the_text_change_nothing(self):
        _, _, partial = setup()
        whole = run(partial)
        windows = run(partial, max_length=80, stride=3)
        assert windows.bits_per_byte == whole.bits_per_byte and windows.kl == whole.kl
        small = run(partial, max_length=10, stride=4, batch_size=3)
        other = run(partial, max_length=10, stride=4, batch_size=50)
        assert small.kl == pytest.approx(other.kl, rel=1e-4) and small.forwards == other.forwards > whole.forwards

    def test_forwards_are_one_a_window_and_one_for_both_where_nothing_is_new(self):
        _, _, partial = setup()
        calls = []
        partial.model.model.layers[0].register_forward_hook(lambda module, args, out: calls.append(len(out)))
        assert run(partial).forwards == 2 * 2 + 2
        assert sum(calls) <= 2 * 2 + 2 + 2  # and two of a few tokens, to see that head and body go apart

    def test_each_position_goes_through_body_and_head_once_and_little_padding(self):
        """Both readings up to the token in which they differ, which is predicted from the same ids, go there once."""
        _, tokenizer, partial = setup()
        texts = [text[:at] for text in TEXTS[:3] for at in range(10, len(text))]
        positions = {"body": 0, "head": 0}

        def count(name, shape):
            positions[name] += shape[0] * shape[1]

        layer, head = partial.model.model.layers[0], partial.model.lm_head
        handles = [
            layer.register_forward_hook(lambda module, args, out: count("body", args[0].shape)),
            head.register_forward_hook(lambda module, args, out: count("head", args[0].shape)),
        ]
        report = run(partial, texts)
        for handle in handles:
            handle.remove()
        readers = (TextReader(tokenizer, partial.token_ids), TextReader(tokenizer))
        body = in_head = 0
        for text in texts:
            before, after = (reader.ids(text) for reader in readers)
            same = next(
                (at for at, pair in enumerate(zip(before, after, strict=False)) if len({*pair}) > 1), len(after)
            )
            shared = min(same + 1, len(after))
            body += len(before) + 1 + (shared < len(after)) * (len(after) + 1)  # each with the bos token
            in_head += len(before) + len(after) - shared
        assert report.texts == len(texts)
        assert body <= positions["body"] <= 1.1 * body
        assert in_head <= positions["head"] <= in_head + 6  # of a trial that the two halves make the whole

    @pytest.mark.parametrize("kind", ["llama", "gemma"])
    def test_how_many_rows_are_measured_at_a_time_changes_no_bit(self, kind, monkeypatch):
        _, _, partial = setup(kind)
        expected = run(partial).to_dict()
        monkeypatch.setattr("hf_partial_embed.evaluation.scoring._BLOCK_BYTES", 1)
        assert run(partial).to_dict() == expected

    def test_an_output_that_cannot_be_adds_nothing(self):
        model, _, partial = setup("phi", tied=False)
        reports = []
        for value in (-math.inf, -1e4):
            with torch.no_grad():
                model.lm_head.bias[7] = value
            reports.append(run(partial, ["Tools are called <think> by name"]))
        assert math.isfinite(reports[0].kl) and reports[0].kl > 0
        assert reports[0].kl == reports[1].kl and reports[0].bits_per_byte == reports[1].bits_per_byte

    @settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        st.lists(
            st.lists(st.sampled_from(["é☃", " ", "praseodymium", " praseodymium", "<think>", "The", " neody", "\n"]))
            .map("".join),
            min_size=1, max_size=4,
        ).filter(any)
    )  # fmt: skip
    def test_parts_make_the_whole_and_nothing_is_lost(self, texts):
        _, tokenizer, partial = setup(tokens=[*WORDS, "praseodymium"])
        report = run(partial, texts)
        read = tokenizer([text for text in texts if text], add_special_tokens=False)["input_ids"]
        assert report.tokens.after == sum(map(len, read))
        assert report.occurrences == sum(token_id in partial.token_ids for ids in read for token_id in ids)
        assert sum(token.count for token in report.per_token) == report.occurrences
        size = len("".join(texts).encode())
        for side, base in (("before", bpe_tokenizer()), ("after", None)):
            nats = 0.0
            for text in filter(None, texts):
                ids = (base or tokenizer)(text, add_special_tokens=False)["input_ids"]
                nats += sum(nats_of(partial.model, ids, 2, 300 if base else None))
            assert getattr(report.bits_per_byte, side) == pytest.approx(nats / math.log(2) / size, rel=1e-4)
        json.loads(report.to_json())


class TestBaseLoadedAlone:
    @pytest.mark.parametrize("kind", ["llama", "gemma", "phi"])
    def test_before_is_the_base_model_bit_for_bit(self, kind, tied, strategy, tmp_path):
        build_model(kind, 300, tied=tied).save_pretrained(tmp_path)
        base = AutoModelForCausalLM.from_pretrained(tmp_path)
        model, _, partial = setup(kind, tied=tied, strategy=strategy)
        ids = bpe_tokenizer()(TEXTS[0])["input_ids"]
        alone, live = HeadStates(base.eval()), HeadStates(model.eval())
        with torch.no_grad():
            (states,), (same) = alone.states([ids]), live.states([ids])
            assert alone.in_chunks and live.in_chunks
            assert torch.equal(states, same[0])
            assert torch.equal(alone.logits(states), live.logits(same[0])[:, :300])
            assert torch.equal(alone.logits(states), base(torch.tensor([ids])).logits[0])
        report = evaluate((base, bpe_tokenizer()), partial, TEXTS, batch_size=1, progress=False)
        assert report.bits_per_byte.before == run(partial, batch_size=1).bits_per_byte.before
        for ours, theirs in zip(run(partial).per_token, report.per_token, strict=True):
            assert ours.token == theirs.token and ours.loss == pytest.approx(theirs.loss, rel=1e-5)
            assert ours.kl == pytest.approx(theirs.kl, rel=1e-3, abs=1e-6)

    def test_a_merged_checkpoint_is_measured_as_the_live_model_is(self, tmp_path):
        build_model("llama", 300).save_pretrained(tmp_path / "base")
        bpe_tokenizer().save_pretrained(tmp_path / "base")
        model, tokenizer, partial = setup()
        live = run(partial).to_dict()
        partial.merge()
        model.save_pretrained(tmp_path / "merged")
        tokenizer.save_pretrained(tmp_path / "merged")
        found = evaluate(tmp_path / "base", str(tmp_path / "merged"), TEXTS, progress=False).to_dict()
        for key in ("bits_per_byte", "bits_per_byte_new", "bits_per_byte_following"):
            assert found[key] == pytest.approx(live[key], rel=1e-5)
        for key in ("tokens", "occurrences", "unseen"):
            assert found[key] == live[key]
        for key in ("kl", "adoption", "leak", "perplexity_change"):
            assert found[key] == pytest.approx(live[key], rel=1e-2, abs=1e-6)
        assert [token["id"] for token in found["per_token"]] == [token["id"] for token in live["per_token"]]

    def test_a_second_set_of_rows_is_old_for_the_first(self):
        _, _tokenizer, partial = setup(tokens=["<think>"])
        alone = run(partial)
        second = add_tokens(partial.model, partial.tokenizer, [AddedToken(" praseodymium", normalized=False)])
        both = run(second)
        assert both.tokens.before == alone.tokens.after and both.occurrences == 2

    def test_model_and_tokenizer_are_left_as_they_were(self):
        model, tokenizer, partial = setup()
        model.train()
        values, text = snapshot(model), tokenizer._tokenizer.to_str()
        learning = [parameter.requires_grad for parameter in model.parameters()]
        tokenizer._tokenizer.enable_truncation(max_length=3)
        torch.manual_seed(1)
        expected = torch.rand(1)
        torch.manual_seed(1)
        run(partial)
        assert torch.equal(torch.rand(1), expected)
        assert model.training and [p.requires_grad for p in model.parameters()] == learning
        assert tokenizer._tokenizer.truncation["max_length"] == 3
        tokenizer._tokenizer.no_truncation()
        assert tokenizer._tokenizer.to_str() == text
        assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())
        assert "forward" not in model.model.__dict__ and not model.lm_head._forward_pre_hooks


class TestReading:
    @pytest.mark.parametrize("make", [bpe_tokenizer, wordpiece_tokenizer, unigram_tokenizer])
    def test_a_reader_without_new_tokens_reads_as_before(self, make):
        before = make()
        tokenizer = deepcopy(before)
        tokenizer.add_tokens([AddedToken(" praseodymium", normalized=False), AddedToken("<think>")])
        new = set(range(len(before), len(tokenizer)))
        reader, now = TextReader(tokenizer, new), TextReader(tokenizer)
        for text in TEXTS:
            assert reader.ids(text) == before(text, add_special_tokens=False)["input_ids"]
            assert now.ids(text) == tokenizer(text, add_special_tokens=False)["input_ids"]

    @pytest.mark.parametrize("make", [bpe_tokenizer, wordpiece_tokenizer, unigram_tokenizer])
    def test_no_vocabulary_is_loaded_anew_to_hide_added_tokens(self, make, monkeypatch):
        tokenizer = make()
        markers = [
            AddedToken("<a>", special=True),
            AddedToken("<b>", lstrip=True),
            AddedToken("<c>", normalized=False),
        ]
        tokenizer.add_tokens([*markers, AddedToken("<d>", single_word=True)])
        hidden = [len(tokenizer) - 3, len(tokenizer) - 1]  # <b> and <d>
        texts = [*TEXTS, "x <a> <b> <c> <d> y", "<a><b><c><d>"]
        anew = [reading._anew(tokenizer._tokenizer, set(ids)).encode_batch(texts) for ids in ((), hidden)]
        monkeypatch.setattr(reading, "changed_copy", lambda *_: pytest.fail("was loaded anew"))
        for ids, expected in zip(((), hidden), anew, strict=True):
            assert [found.ids for found in TextReader(tokenizer, ids).read(texts)] == [one.ids for one in expected]

    def test_pieces_with_merges_are_hidden_too(self):
        before = bpe_tokenizer()
        state = json.loads(before._tokenizer.to_str())
        left, right = before.tokenize("elements")[-2:]
        state["model"]["vocab"][left + right] = 300
        state["model"]["merges"].append([left, right])
        tokenizer = bpe_tokenizer()
        tokenizer._tokenizer.__setstate__(json.dumps(state).encode())
        text = "The elements of the elements"
        assert 300 in tokenizer(text)["input_ids"]
        assert TextReader(tokenizer, [300]).ids(text) == before(text)["input_ids"]

    @pytest.mark.parametrize("enabled", [True, False])
    def test_garbage_is_not_looked_for_while_a_vocabulary_is_read(self, enabled, monkeypatch):
        tokenizer = bpe_tokenizer()
        seen = []

        def cut(*_):
            seen.append(gc.isenabled())
            raise KeyError("merges")

        monkeypatch.setattr(reading, "cut_merges", cut)
        (gc.enable if enabled else gc.disable)()
        try:
            with pytest.raises(KeyError):
                TextReader(tokenizer, [280])
            assert seen == [False] and gc.isenabled() == enabled
        finally:
            gc.enable()

    def test_a_hidden_token_in_the_middle_leaves_the_others_their_ids(self):
        tokenizer = bpe_tokenizer()
        tokenizer.add_tokens(["<one>", "<two>", "<three>"])
        ids = TextReader(tokenizer, [301]).ids("<one><two><three>")
        assert ids[0] == 300 and ids[-1] == 302 and 301 not in ids

    @given(st.text(max_size=30))
    @settings(max_examples=50, deadline=None)
    def test_spans_are_the_whole_text(self, text):
        (reading,) = TextReader(bpe_tokenizer()).read([text])
        assert reading.starts == [0, *reading.ends[:-1]][: len(reading.ids)]
        if reading.ids:
            assert reading.ends[-1] == len(text) and all(
                a <= b for a, b in zip(reading.starts, reading.ends, strict=True)
            )


def fit(parameters, model, sequences, steps, rate):
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    for _ in range(steps):
        for ids in sequences:
            model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def trained(seed=0, tokens=WORDS):
    """A tiny model that has learned some texts by heart, and rows that have learned the same."""
    tokenizer = bpe_tokenizer()
    model = build_model("llama", len(tokenizer), tied=seed % 2 == 0, seed=seed)
    sequences = [torch.tensor([[2, *ids]]) for ids in tokenizer(FAULT_TEXTS)["input_ids"]]
    fit(model.parameters(), model, sequences, 60, 0.02)
    partial = add_tokens(model, tokenizer, words(tokens), seed=seed)
    sequences = [torch.tensor([[2, *ids]]) for ids in tokenizer(FAULT_TEXTS)["input_ids"]]
    fit(partial.parameters(), model, sequences, 60, 0.05)
    return model.eval(), partial


FAULT_TEXTS = [
    "The praseodymium is a twin.",
    "A neodymium answers.",
    "A model reads tokens and answers.",
    "Tools are called <think> by name.",
]


class TestPlantedFaults:
    """Six faults in good models, all of which the report has to name."""

    @pytest.mark.parametrize("seed", [0, 1])
    def test_swapped_rows_are_the_worst(self, seed):
        _, partial = trained(seed)
        good = run(partial, FAULT_TEXTS)
        with torch.no_grad():
            for parameter in partial.parameters():
                parameter[[0, 2]] = parameter[[2, 0]]
        bad = run(partial, FAULT_TEXTS)
        assert {token.token for token in bad.per_token[:2]} == {" praseodymium", " neodymium"}
        assert not any(token.swapped_with for token in good.per_token)
        assert bad.per_token[1].change > max(token.change for token in good.per_token) + 1

    @pytest.mark.parametrize("seed", [0, 1])
    def test_an_untrained_row_is_the_worst(self, seed):
        _, partial = trained(seed)
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in partial.parameters():
                parameter[1] = torch.randn_like(parameter[1]) * parameter.std()
        bad = run(partial, FAULT_TEXTS)
        assert bad.per_token[0].token == "<think>"
        assert bad.per_token[0].change > bad.per_token[1].change + 1

    def test_swapped_rows_of_any_pair_are_named(self):
        tokenizer = bpe_tokenizer()
        torch.manual_seed(0)
        sizes = {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=300, tie_word_embeddings=True, pad_token_id=1, **sizes))
        partial = add_tokens(model, tokenizer, words())
        rows = next(partial.parameters())
        with torch.no_grad():
            rows.add_(0.004 * torch.randn_like(rows))
        assert not any(token.swapped_with for token in run(partial).per_token)
        for one, other in combinations(range(4), 2):
            with torch.no_grad():
                rows[[one, other]] = rows[[other, one]]
            report = run(partial)
            found = {token.token: token.swapped_with for token in report.per_token if token.swapped_with}
            assert found == {WORDS[one]: WORDS[other], WORDS[other]: WORDS[one]}
            assert {token.token for token in report.per_token[:2]} == set(found)
            assert any("swapped" in note for note in report.notes)
            with torch.no_grad():
                rows[[one, other]] = rows[[other, one]]
        with torch.no_grad():
            rows.copy_(torch.randn_like(rows))
        assert not any(token.swapped_with for token in run(partial).per_token)

    @pytest.mark.parametrize("token", ["swer", "abl"])
    def test_a_token_that_cuts_other_words_is_named(self, token):
        tokenizer = bpe_tokenizer(600)  # reads these words whole
        model = build_model("llama", len(tokenizer))
        partial = add_tokens(model, tokenizer, words(["<think>", token]))
        report = run(partial, [*CORPUS[:4], "Here <think>."])
        assert {result.token for result in report.per_token if result.cuts} == {token}
        assert any("cut other words" in note and repr(token) in note for note in report.notes)
        assert f"{token!r}" in str(report)


class TestBadInput:
    def test_texts_without_a_new_token_are_reported(self):
        _, _, partial = setup()
        report = run(partial, [TEXTS[1], TEXTS[3]])
        assert report.occurrences == 0 and report.unseen == WORDS
        assert report.tokens.before == report.tokens.after and report.kl is None and report.adoption is None
        assert report.leak > 0 and "No new token occurs" in str(report)

    @pytest.mark.parametrize(
        ("texts", "message"),
        [
            ([], "no text to evaluate"),
            (["", ""], "all of them are empty"),
            ("a text", "must be a list of texts"),
            (["a", 3], "Text 1 is int"),
            (["a\ud800"], "lone surrogate"),
        ],
    )
    def test_no_texts(self, texts, message):
        _, _, partial = setup()
        with pytest.raises(PartialEmbeddingError, match=message):
            run(partial, texts)

    def test_empty_texts_are_left_out_and_counted(self):
        _, _, partial = setup()
        report = run(partial, ["", *TEXTS, ""])
        assert report.texts == 4 and any("2 texts left out" in note for note in report.notes)
        assert run(partial, iter(TEXTS)).bits_per_byte == report.bits_per_byte

    @pytest.mark.parametrize(
        "options",
        [{"max_length": 1}, {"max_length": 65}, {"max_length": 8, "stride": 8}, {"stride": 0}, {"batch_size": 0}],
    )
    def test_windows_that_cannot_be(self, options):
        _, _, partial = setup("gpt2")  # reads 64 tokens
        with pytest.raises(PartialEmbeddingError, match=next(iter(options)) if len(options) == 1 else "stride=8"):
            run(partial, **options)

    def test_a_text_longer_than_any_window(self):
        _, _, partial = setup("gpt2")
        report = run(partial, [" ".join([TEXTS[0]] * 30)])
        assert report.max_length == 64 and report.forwards > 20 and math.isfinite(report.bits_per_byte.after)

    @pytest.mark.parametrize("strategy", ["split", "mask"])
    def test_not_finite_is_an_error(self, strategy):
        model, _, partial = setup(strategy=strategy)
        with torch.no_grad():
            rows = next(partial.parameters())
            rows[0 if strategy == "split" else 300] = math.nan
        values = snapshot(model)
        with pytest.raises(PartialEmbeddingError, match=r"not finite: .* in text \d"):
            run(partial)
        assert all(torch.equal(a.nan_to_num(7), values[n].nan_to_num(7)) for n, a in model.state_dict().items())

    def test_models_that_do_not_belong_together(self):
        model, tokenizer, partial = setup()
        other = (build_model("llama", 120), wordpiece_tokenizer())
        with pytest.raises(PartialEmbeddingError, match="do not belong together"):
            evaluate(other, partial, TEXTS)
        with pytest.raises(PartialEmbeddingError, match="base has rows on it"):
            evaluate((model, tokenizer), (model, tokenizer), TEXTS)
        with pytest.raises(PartialEmbeddingError, match="must be a folder"):
            evaluate(3, partial, TEXTS)

    def test_rows_that_were_there_need_their_base(self):
        tokenizer = bpe_tokenizer()
        base, model = build_model(), build_model()
        partial = train_tokens(model, tokenizer, [tokenizer.convert_ids_to_tokens(280)])
        with pytest.raises(PartialEmbeddingError, match="were there before"):
            run(partial)
        report = evaluate((base, bpe_tokenizer()), partial, TEXTS, progress=False)
        assert report.bits_per_byte.before == pytest.approx(report.bits_per_byte.after)
        assert any("no token that base does not have" in note for note in report.notes)

    def test_rows_that_are_off(self):
        _, _, partial = setup()
        partial.detach()
        with pytest.raises(PartialEmbeddingError, match="Cannot evaluate"):
            run(partial)

    def test_a_tokenizer_without_a_fast_backend(self, tmp_path):
        from transformers import PreTrainedTokenizer

        class Slow(PreTrainedTokenizer):
            is_fast = False

        with pytest.raises(PartialEmbeddingError, match="no fast backend"):
            TextReader(Slow.__new__(Slow))

    @pytest.mark.parametrize("kind", ["bert", "t5", "bert-encoder"])
    def test_other_kinds_of_models_have_their_tokens_counted(self, kind):
        tokenizer = bpe_tokenizer()
        partial = add_tokens(build_model(kind), tokenizer, words())
        report = run(partial)
        assert report.occurrences == 6 and report.saving > 0.1 and report.bits_per_byte.after is None
        assert any("were not measured" in note for note in report.notes)
        str(report)


class TestHalves:
    def test_a_model_whose_head_cannot_be_run_apart_is_run_whole(self, monkeypatch):
        model, _, partial = setup()
        expected = run(partial)
        monkeypatch.setattr(type(model), "base_model", property(lambda self: self))
        report = run(partial)
        assert report.bits_per_byte.after == pytest.approx(expected.bits_per_byte.after, rel=1e-5)
        assert any("whole batch" in note for note in report.notes)

    def test_a_head_that_takes_no_empty_input_is_run_apart_too(self):
        model, _, partial = setup()
        expected = run(partial).to_dict()

        def refuse(module, args):
            if not args[0].numel():
                raise RuntimeError("nothing to multiply")

        model.lm_head.register_forward_hook(lambda module, args, output: refuse(module, args))
        assert run(partial).to_dict() == expected

    def test_what_is_done_to_logits_behind_the_head_is_done(self):
        model, _, partial = setup("gemma")
        plain = run(partial).bits_per_byte.after
        model.config.final_logit_softcapping = 0.5
        capped = run(partial).bits_per_byte.after
        ids = partial.tokenizer(TEXTS[3])["input_ids"]
        assert capped != pytest.approx(plain, rel=1e-3)
        nats = nats_of(model, ids, 2)
        assert run(partial, [TEXTS[3]]).bits_per_byte.after == pytest.approx(
            sum(nats) / math.log(2) / len(TEXTS[3]), rel=1e-4
        )

    def test_logits_exist_for_a_chunk_of_positions_only(self, monkeypatch):
        model, _, partial = setup()
        expected = run(partial)
        monkeypatch.setattr(HeadStates, "positions_at_once", 7)
        sizes = []
        model.lm_head.register_forward_hook(lambda module, args, out: sizes.append(out.shape[0] * out.shape[1]))
        report = run(partial, batch_size=4)
        assert max(sizes) <= 8  # two of them are the trial's
        assert report.bits_per_byte.after == pytest.approx(expected.bits_per_byte.after, rel=1e-5)
        assert report.kl == pytest.approx(expected.kl, rel=1e-3)


class TestReport:
    def test_dict_has_the_contract_s_keys(self):
        _, _, partial = setup()
        report = run(partial, timed_texts=1)
        assert isinstance(report, EvaluationReport)
        values = json.loads(report.to_json())
        for key in ("tokens", "bits_per_byte", "bits_per_byte_new", "bits_per_byte_following", "seconds_per_text"):
            assert set(values[key]) == {"before", "after"} and values[key]["after"] > 0
        for key in ("kl", "adoption", "leak", "perplexity_change"):
            assert isinstance(values[key], float)
        assert {"token", "id", "count"} <= set(values["per_token"][0])
        changes = [token["change"] for token in values["per_token"]]
        assert changes == sorted(changes, reverse=True)
        assert values == json.loads(json.dumps(report.to_dict()))

    def test_picture(self, tmp_path):
        pytest.importorskip("matplotlib")
        _, _, partial = setup()
        figure = plot_report(run(partial), path=tmp_path / "report.png")
        bars, _, changes = figure.axes
        assert len(bars.patches) == 6 and len(changes.patches) == 4
        assert (tmp_path / "report.png").stat().st_size > 10_000
        plot_report(run(partial, [TEXTS[1]]))

    def test_loaded_rows_are_evaluated_too(self, tmp_path):
        _, _, partial = setup()
        partial.save_pretrained(tmp_path)
        expected = run(partial)
        again = TokenRows.from_pretrained(tmp_path).attach(build_model("llama", 300), bpe_tokenizer())
        assert run(again).bits_per_byte == expected.bits_per_byte
        assert table_of(again.model).shape == (304, 16)
