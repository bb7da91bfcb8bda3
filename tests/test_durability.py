"""Saving when the system does not go along: kills, a full disk, a folder that takes no files, errors of any call.

The default run kills some tens of saves; with

    pytest -m slow tests/test_durability.py

it is hundreds, of row files and of merged checkpoints.
"""

from __future__ import annotations

import errno
import mmap
import os
import random
import shutil
import signal
import tempfile
import time
from itertools import count
from pathlib import Path

import pytest
import torch
from conftest import bpe_tokenizer, build_model
from injection import first_moments, interrupted, moments_of
from processes import forked, kill, posix, rows, run_forked
from quick import quick
from safetensors import SafetensorError
from safetensors.torch import load_file
from trainings import setup, train
from transformers import LlamaForCausalLM

from hf_partial_embed import PartialEmbeddingCallback, PartialEmbeddingError, TokenRows, add_tokens
from hf_partial_embed.cli import main as cli
from hf_partial_embed.cli.output import fresh_folder
from hf_partial_embed.files.rows_file import ROWS_FILE

pytestmark = posix


# Kills


class Progress:
    """Says from one process to another whether something is going on, and how often it has been done."""

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, 2)

    def loop(self, save) -> None:
        for number in count():
            self.memory[0] = 1
            save(number)
            self.memory[0] = 0
            self.memory[1] = min(255, self.memory[1] + 1)


def kills_during(save, kills: int, longest: float, check) -> int:
    """Kill a fork that saves for ever, again and again, at random moments while it saves; look at each result.

    Returns:
        How many kills came while a save was going on: `kills`, of as many more as it takes.
    """
    delays, cut_short = random.Random(0), 0
    for number in range(10 * kills):
        progress = Progress()
        process = forked(progress.loop, lambda i, number=number: save(number + i))
        while not progress.memory[1]:  # until it has saved once
            assert os.waitpid(process, os.WNOHANG)[0] == 0, "the fork has ended by itself"
            time.sleep(0.0005)
        time.sleep(delays.uniform(0, longest))
        kill(process)
        cut_short += progress.memory[0]
        check()
        if cut_short == kills:
            break
    return cut_short


def kill_row_saves(folder: str, kills: int) -> tuple[int, set[float], int]:
    """Returns the kills that came in a save, the values found afterwards, and the temporary files left."""
    sets = [rows(64, 2048, fill=float(number)) for number in range(3)]
    found, left = set(), 0

    def check() -> None:
        nonlocal left
        values = TokenRows.from_pretrained(folder).input_rows.unique().tolist()
        assert len(values) == 1, f"a mixture of {values}"
        card = Path(folder, "README.md").read_text("utf-8")
        assert card.startswith("---\n") and card.endswith("| `input_rows` | 64 × 2048 |\n")
        found.add(values[0])
        for name in os.listdir(folder):
            if name.startswith("."):  # what a killed process cannot take away
                left += 1
                Path(folder, name).unlink()

    cut_short = kills_during(lambda number: sets[number % 3].save_pretrained(folder), kills, 0.01, check)
    assert set(os.listdir(folder)) == {"README.md", ROWS_FILE}
    return cut_short, found, left


@pytest.mark.parametrize("kills", [25, pytest.param(400, marks=pytest.mark.slow)])
def test_old_or_new_file_is_whole_after_a_kill_at_any_moment(elsewhere, tmp_path, kills):
    cut_short, found, left = elsewhere(kill_row_saves, str(tmp_path), kills)
    print(f"{cut_short} kills while a save was going on, {left} temporary files left")
    assert cut_short == kills and found == {0.0, 1.0, 2.0} and left > kills // 10


def filled(value: float):
    model = build_model(vocab=4000)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)
    return model


def state_of(folder: Path) -> str:
    """Which of the models saved there a folder has: "0", "1", ..., "none", or what is wrong with it."""
    if not (folder / "model.safetensors").is_file():
        return "none"
    try:
        tensors = load_file(folder / "model.safetensors").values()
    except SafetensorError:
        return "damaged"
    values = {value for tensor in tensors for value in tensor.unique().tolist()}
    return str(int(values.pop())) if len(values) == 1 else "mixed"


def kill_checkpoint_saves(folder: str, kills: int, ours: bool) -> tuple[int, dict[str, int]]:
    models, states = [filled(float(number)) for number in range(2)], {}
    out = Path(folder, "out")

    def save(number: int) -> None:
        if ours:
            options = cli._parser().parse_args(["merge", "base", "rows", str(out), "--force"])
            with fresh_folder(options) as fresh:
                models[number % 2].save_pretrained(fresh)
        else:
            models[number % 2].save_pretrained(out)

    def check() -> None:
        state = state_of(out)
        if state == "none":  # between two renamings: the old one is whole, beside it
            state = "put aside" if any(state_of(old) in "01" for old in Path(folder).glob(".out.*/old")) else "lost"
        states[state] = states.get(state, 0) + 1
        for left in Path(folder).glob(".out.*"):
            shutil.rmtree(left)

    return kills_during(save, kills, 0.03, check), states


@pytest.mark.parametrize("kills", [6, pytest.param(150, marks=pytest.mark.slow)])
def test_merged_folder_of_the_command_is_old_or_new_after_a_kill(elsewhere, tmp_path, kills):
    cut_short, states = elsewhere(kill_checkpoint_saves, str(tmp_path), kills, True)
    print(f"{cut_short} kills while a checkpoint was written: {states}")
    assert cut_short == kills and set(states) <= {"0", "1", "put aside"}


@pytest.mark.slow
def test_transformers_own_save_writes_over_what_was_there(elsewhere, tmp_path):
    """No promise of this package: `model.save_pretrained` into a folder that has a checkpoint is not atomic."""
    cut_short, states = elsewhere(kill_checkpoint_saves, str(tmp_path), 200, False)
    print(f"{cut_short} kills while transformers wrote a checkpoint: {states}")
    assert cut_short == 200 and "mixed" not in states


# Training that is interrupted while it saves a checkpoint

STOPS = {
    "in the middle of the model": ("safetensors.torch", "serialize_file"),
    "before the optimizer": ("transformers.trainer.Trainer", "_save_optimizer_and_scheduler"),
    "before the random state": ("transformers.trainer.Trainer", "_save_rng_state"),
    "before the state of the trainer": ("transformers.trainer_callback.TrainerState", "save_to_json"),
    "before the row file": ("hf_partial_embed.attachment.partial.TokenRows", "save_file"),
}


def train_and_die(folder: str, stop: str) -> None:
    """Train, and be killed within the second of two checkpoints."""
    owner, name = STOPS[stop]
    module, _, cls = (owner, "", "") if owner == "safetensors.torch" else owner.rpartition(".")
    holder = __import__(module, fromlist=["x"])
    holder = getattr(holder, cls) if cls else holder
    original, calls = getattr(holder, name), 0

    def die(*arguments, **options):
        nonlocal calls
        calls += 1
        if Path(folder, "checkpoint-4").is_dir():
            if name == "serialize_file":
                Path(arguments[1]).write_bytes(b"\x40\0\0\0\0\0\0\0{half")
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **options)

    setattr(holder, name, die)
    model, tokenizer, partial = setup(dtype=torch.bfloat16)
    train(model, tokenizer, partial, folder, callbacks=[PartialEmbeddingCallback(partial)], save_steps=2)
    raise AssertionError(f"not killed; {calls} calls")


@pytest.mark.parametrize(
    "stop", quick(STOPS, lambda stop: stop in ("before the row file", "in the middle of the model"))
)
def test_run_that_was_killed_while_it_saved_resumes(elsewhere, tmp_path, stop):
    assert elsewhere(run_forked, train_and_die, str(tmp_path / "run"), stop) == -signal.SIGKILL
    whole = [path for path in (tmp_path / "run").glob("checkpoint-*") if (path / "trainer_state.json").is_file()]
    last = max(whole, key=lambda path: int(path.name.rpartition("-")[2]))
    assert last.name == ("checkpoint-4" if stop == "before the row file" else "checkpoint-2")

    def finish(folder, resume):
        model, tokenizer, partial = setup(dtype=torch.bfloat16)
        callback = PartialEmbeddingCallback(partial)
        train(model, tokenizer, partial, folder, callbacks=[callback], save_steps=2, resume=resume)
        return model, partial

    model, partial = finish(tmp_path / "run", str(last))
    other, never_killed = finish(tmp_path / "other", None)
    for resumed, expected in zip(partial.parameters(), never_killed.parameters(), strict=True):
        assert resumed.dtype == torch.float32 and torch.equal(resumed, expected)
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())


# Errors


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def save_on_a_full_disk(folder: str) -> None:
    import resource  # POSIX only

    rows(fill=1.0).save_pretrained(folder)
    before = contents(Path(folder))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    for limit in (0, 1, 100, 10_000, 500_000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        with pytest.raises(PartialEmbeddingError, match=r"Cannot write .* What was there before is still there."):
            rows(64, 2048).save_pretrained(folder)
        assert contents(Path(folder)) == before
    resource.setrlimit(resource.RLIMIT_FSIZE, (600, resource.RLIM_INFINITY))  # the rows fit, the card does not
    with pytest.raises(OSError, match="File too large"):
        rows(1, 1).save_pretrained(folder)
    assert len(TokenRows.from_pretrained(folder)) == 1 and contents(Path(folder))["README.md"] == before["README.md"]
    assert len(os.listdir(folder)) == 2


def test_full_disk_leaves_the_old_files_and_says_so(elsewhere, tmp_path):
    assert elsewhere(run_forked, save_on_a_full_disk, str(tmp_path)) == 0


def save_without_permission() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows(fill=1.0).save_pretrained(folder)
        before = contents(folder)
        folder.chmod(0o555)
        if os.getuid() == 0:  # to whom permissions mean nothing
            os.seteuid(65534)
        with pytest.raises(PermissionError):
            rows(fill=2.0).save_pretrained(folder)
        os.seteuid(os.getuid())
        assert contents(folder) == before


def test_folder_without_write_permission_stays_as_it_was(elsewhere):
    assert elsewhere(run_forked, save_without_permission) == 0


@pytest.mark.parametrize("call", ["open", "fsync", "replace"])
@pytest.mark.parametrize("number", [ENOSPC := errno.ENOSPC, errno.EIO, errno.EDQUOT], ids=errno.errorcode.get)
def test_error_of_any_system_call_leaves_whole_files_and_nothing_else(tmp_path, monkeypatch, call, number):
    old, new = rows(fill=1.0), rows(fill=2.0)
    original = getattr(os, call)
    for failing in range(1, 20):
        old.save_pretrained(tmp_path)
        calls = 0

        def fail(*arguments, failing=failing, **options):
            nonlocal calls
            calls += 1
            if calls == failing:
                raise OSError(number, os.strerror(number))
            return original(*arguments, **options)

        with monkeypatch.context() as patch:
            patch.setattr(os, call, fail)
            try:
                new.save_pretrained(tmp_path)
                break
            except OSError as error:
                assert error.errno == number
        assert sorted(os.listdir(tmp_path)) == ["README.md", ROWS_FILE]
        assert TokenRows.from_pretrained(tmp_path).input_rows.unique().tolist() in ([1.0], [2.0])
    assert failing >= 3  # once for each of the two files, at least


def test_interrupt_at_any_line_of_saving_leaves_whole_files_and_nothing_else(tmp_path):
    old, new = rows(fill=1.0), rows(fill=2.0)
    new.save_pretrained(tmp_path)
    seen = set()
    for moment in first_moments(
        moments_of(lambda: new.save_pretrained(tmp_path), ["attachment.partial", "files.rows_file", "files.hub"])
    ):
        old.save_pretrained(tmp_path)
        assert interrupted(lambda: new.save_pretrained(tmp_path), moment)
        assert sorted(os.listdir(tmp_path)) == ["README.md", ROWS_FILE], moment
        seen.update(TokenRows.from_pretrained(tmp_path).input_rows.unique().tolist())
    assert seen == {1.0, 2.0}


def test_interrupted_merge_leaves_the_old_folder(tmp_path):
    model, tokenizer = build_model(), bpe_tokenizer()
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "base")
    add_tokens(model, tokenizer, ["<a>"]).save_pretrained(tmp_path / "rows")
    arguments = ["merge", str(tmp_path / "base"), str(tmp_path / "rows"), str(tmp_path / "out"), "--force", "--quiet"]
    assert cli.main(arguments) == 0
    before = contents(tmp_path / "out")
    moments = first_moments(moments_of(lambda: cli.main(arguments), ["cli"]))
    for moment in moments[:: 1 + len(moments) // 12]:
        interrupted(lambda: cli.main(arguments), moment)
        assert contents(tmp_path / "out").keys() == before.keys() and not list(tmp_path.glob(".out*")), moment
        assert LlamaForCausalLM.from_pretrained(tmp_path / "out").config.vocab_size == 301
