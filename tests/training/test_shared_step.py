"""`shared_step`: all rows move together, beside each row's own step."""

from __future__ import annotations

import pytest
import torch
from trainings import Texts, arguments, setup
from transformers import Trainer

from hf_partial_embed import PartialEmbeddingCallback, PartialEmbeddingError
from hf_partial_embed.training.optimizers import SharedStep

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def trained(folder, shared=True, resume=None, *, tied=True, **options):
    model, _, partial = setup(tied=tied)
    trainer = Trainer(
        model=model,
        args=arguments(folder, **options),
        train_dataset=Texts(partial.token_ids),
        callbacks=[PartialEmbeddingCallback(partial, learning_rate=1e-2, shared_step=shared)],
    )
    trainer.train(resume_from_checkpoint=resume)
    partial.verify()
    return partial.token_rows()


@pytest.mark.parametrize("factor", [1.0, 2.5])
def test_step_is_adams_with_own_and_shared_parts_as_parameters(factor):
    generator = torch.Generator().manual_seed(0)
    start, target = torch.randn(4, 3, generator=generator), torch.randn(4, 3, generator=generator)
    own, shared = start.clone().requires_grad_(True), torch.zeros(1, 3, requires_grad=True)
    expected = torch.optim.Adam([{"params": [own]}, {"params": [shared], "lr": 0.01 * factor}], lr=0.01)
    rows = torch.nn.Parameter(start.clone())
    made = torch.optim.Adam([rows], lr=0.01)
    made.register_step_post_hook(SharedStep(made, [rows], factor))
    for _ in range(20):
        for optimizer, value in ((expected, lambda: own + shared), (made, lambda: rows)):
            optimizer.zero_grad()
            (value() - target).pow(4).sum().backward()
            optimizer.step()
        torch.testing.assert_close(rows.detach(), (own + shared).detach(), rtol=1e-4, atol=1e-5)


def test_all_rows_move_a_common_way(tmp_path, tied):
    start = setup(tied=tied)[2].token_rows()
    alone, together = (trained(tmp_path / str(shared), shared, tied=tied) for shared in (False, True))
    for name in ["input_rows"] if tied else ["input_rows", "output_rows"]:
        common = [(rows.tensors()[name] - start.tensors()[name]).mean(0).norm() for rows in (alone, together)]
        assert common[1] > 1.2 * common[0], name


def test_resumed_is_as_never_interrupted(tmp_path):
    whole = trained(tmp_path / "whole", save_strategy="steps", save_steps=3)
    resumed = trained(
        tmp_path / "again", resume=str(tmp_path / "whole" / "checkpoint-3"), save_strategy="steps", save_steps=3
    )
    assert torch.equal(whole.input_rows, resumed.input_rows)


def test_masked_tables_are_refused():
    _, _, partial = setup(strategy="mask")
    with pytest.raises(PartialEmbeddingError, match="strategy='split'"):
        PartialEmbeddingCallback(partial, shared_step=True)
    with pytest.raises(PartialEmbeddingError, match="shared_step=-1 must be"):
        PartialEmbeddingCallback(setup()[2], shared_step=-1)
