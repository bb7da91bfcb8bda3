"""Optimizers that do not step as the callback needs it are refused by name before the first step."""

from __future__ import annotations

import inspect
import types

import pytest
import torch
from trainings import Texts, arguments, setup
from transformers import Trainer, TrainerCallback
from transformers.trainer_pt_utils import LayerWiseDummyOptimizer

from hf_partial_embed import PartialEmbeddingCallback, PartialEmbeddingError


class InBackward(torch.optim.Optimizer):
    """As LOMO does it: each parameter is updated as soon as its gradient is there, and there is no step."""

    def __init__(self, parameters, lr=1e-2):
        super().__init__(parameters, {"lr": lr})
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.register_post_accumulate_grad_hook(self.update)

    def update(self, parameter):
        parameter.data.sub_(parameter.grad, alpha=self.param_groups[0]["lr"])
        parameter.grad = None


class Unprepared(torch.optim.Optimizer):
    """Does not call the constructor that hooks its step."""

    def __init__(self, parameters):
        self.defaults, self.state = {"lr": 0.1}, {}
        self.param_groups = [{"params": list(parameters), "lr": 0.1, "weight_decay": 0.0}]

    def step(self, closure=None):
        pass


def layerwise(parameters):
    """As the Trainer makes the layer-wise ones of GaLore and APOLLO."""
    optimizers = {parameter: torch.optim.SGD([parameter], lr=0.1) for parameter in parameters}
    for parameter in optimizers:
        parameter.register_post_accumulate_grad_hook(lambda p: optimizers[p].step())
    return LayerWiseDummyOptimizer(optimizer_dict=optimizers, lr=0.1)


def around_its_hooks(parameters):
    """Its class is like any other, but what is called is not the step that PyTorch has hooked."""
    optimizer = torch.optim.SGD(list(parameters), lr=0.1)
    step = torch.no_grad()(inspect.unwrap(torch.optim.SGD.step))
    optimizer.step = types.MethodType(step, optimizer)
    return optimizer


class Steps(TrainerCallback):
    count = 0

    def on_step_end(self, args, state, control, **kwargs):
        self.count += 1


def train(tmp_path, make, strategy="split"):
    model, _, partial = setup(strategy=strategy)
    optimizer = make([parameter for parameter in model.parameters() if parameter.requires_grad])
    steps = Steps()
    trainer = Trainer(
        model=model, args=arguments(tmp_path, save_strategy="no"), train_dataset=Texts(partial.token_ids),
        optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)),
        callbacks=[PartialEmbeddingCallback(partial, learning_rate=1e-3), steps],
    )  # fmt: skip
    with pytest.raises(PartialEmbeddingError) as caught:
        trainer.train()
    return str(caught.value), steps.count


@pytest.mark.parametrize(
    ("make", "name"), [(InBackward, "InBackward"), (layerwise, "LayerWiseDummyOptimizer"), (around_its_hooks, "SGD")]
)
def test_an_optimizer_that_steps_elsewhere_is_refused_by_name(tmp_path, make, name, strategy):
    message, steps = train(tmp_path, make, strategy)
    assert name in message
    assert "in the backward" in message
    assert "adamw_torch" in message
    assert steps == 0


def test_an_optimizer_without_hooks_is_refused_by_name():
    from hf_partial_embed.training.optimizers import check_steps

    with pytest.raises(PartialEmbeddingError, match="Unprepared does not update"):
        check_steps(Unprepared([torch.nn.Parameter(torch.zeros(1))]))
    check_steps(torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))]))
