"""The Trainer's optimizer and callback: its checkpoints, its logs, its schedule."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from models import CLASSES, features, mlp
from torch import nn, optim
from training import same

from ewc_fast import EWC, EWCOptimizer

pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers")

from transformers import Trainer, TrainerCallback, TrainingArguments  # noqa: E402
from transformers.modeling_outputs import SequenceClassifierOutput  # noqa: E402

from ewc_fast.integrations.huggingface import EWCCallback, ewc_optimizer  # noqa: E402


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.network = mlp()

    def forward(self, inputs, labels=None):
        logits = self.network(inputs)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


class Stop(TrainerCallback):
    """Ends a training early, as a crash would."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 4


def task(seed: int, n: int = 32) -> list[dict[str, torch.Tensor]]:
    torch.manual_seed(seed)
    labels = torch.randint(CLASSES, (n,))
    return [{"inputs": x, "labels": y} for x, y in zip(features(n), labels, strict=True)]


def arguments(folder, **options) -> TrainingArguments:
    defaults = {"num_train_epochs": 2, "per_device_train_batch_size": 8, "report_to": "none"}
    defaults |= {"use_cpu": True, "disable_tqdm": True, "logging_steps": 1, "save_strategy": "no"}
    return TrainingArguments(str(folder), **(defaults | {"learning_rate": 0.01} | options))


def first_task(folder) -> tuple[Classifier, EWC]:
    model = Classifier()
    ewc = EWC(model, ewc_lambda=30.0)
    train(model, ewc, arguments(folder), task(1))
    return model, ewc


def train(model, ewc, args, data, *callbacks, resume=None, mode="gradient") -> Trainer:
    chosen = ewc_optimizer(ewc, args, mode=mode)
    trainer = Trainer(
        model,
        args,
        train_dataset=data,
        callbacks=[EWCCallback(ewc), *callbacks],
        optimizer_cls_and_kwargs=chosen,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_the_end_of_training_consolidates_the_task(tmp_path):
    model, ewc = first_task(tmp_path)
    by_hand = EWC(model, ewc_lambda=30.0)
    by_hand.consolidate([torch.utils.data.default_collate(task(1))])
    assert ewc.tasks == 1
    for name, fisher in by_hand.fisher.items():
        torch.testing.assert_close(ewc.fisher[name], fisher)
        assert torch.equal(ewc.anchor[name], by_hand.anchor[name])


def test_consolidation_can_be_left_to_the_user(tmp_path):
    model = Classifier()
    ewc = EWC(model, ewc_lambda=30.0)
    args = arguments(tmp_path, num_train_epochs=1)
    callback = EWCCallback(ewc, at_end=False)
    trainer = Trainer(model, args, train_dataset=task(1), callbacks=[callback])
    trainer.train()
    assert ewc.tasks == 0
    ewc.consolidate(trainer.get_train_dataloader())
    assert ewc.tasks == 1


@pytest.mark.parametrize("mode", ["gradient", "proximal"])
def test_a_resumed_run_ends_as_one_that_was_not_interrupted(tmp_path, mode):
    args = arguments(tmp_path / "b", save_strategy="steps", save_steps=4)
    whole, ewc = first_task(tmp_path / "a")
    train(whole, ewc, args, task(2), mode=mode)

    cut, before = first_task(tmp_path / "a")
    args = arguments(tmp_path / "c", save_strategy="steps", save_steps=4)
    train(cut, before, args, task(2), Stop(), mode=mode)

    resumed = Classifier()
    after = EWC(resumed, ewc_lambda=1.0)
    checkpoint = str(tmp_path / "c" / "checkpoint-4")
    train(resumed, after, args, task(2), resume=checkpoint, mode=mode)
    assert same(resumed.state_dict(), whole.state_dict())
    assert same(after.state_dict(), ewc.state_dict())


def test_the_trainer_keeps_its_groups_and_schedule(tmp_path):
    model = Classifier()
    ewc = EWC(model, ewc_lambda=30.0)
    trainer = train(model, ewc, arguments(tmp_path, weight_decay=0.1), task(1))
    optimizer = trainer.optimizer.optimizer
    assert isinstance(optimizer, EWCOptimizer)
    assert isinstance(optimizer.optimizer, optim.AdamW)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert optimizer.param_groups[0]["lr"] == 0.0  # linear decay has ended


def test_an_optimizer_made_by_hand_trains_the_same(tmp_path):
    by_trainer, ewc = first_task(tmp_path)
    args = arguments(tmp_path, optim="sgd", max_grad_norm=0.0)
    train(by_trainer, ewc, args, task(2))

    by_hand, ewc = first_task(tmp_path)
    optimizer = EWCOptimizer(optim.SGD(by_hand.parameters(), lr=0.01), ewc)
    Trainer(by_hand, args, train_dataset=task(2), optimizers=(optimizer, None)).train()
    assert same(by_hand.state_dict(), by_trainer.state_dict())


def test_the_penalty_is_logged_beside_the_loss(tmp_path):
    model, ewc = first_task(tmp_path)
    trainer = train(model, ewc, arguments(tmp_path), task(2))
    logged = [entry["ewc_penalty"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 8
    assert logged[-1] > 0.0


def test_several_processes_need_the_same_batches():
    ewc = EWC(mlp(), ewc_lambda=1.0)
    with pytest.raises(ValueError, match="2 processes"):
        EWCCallback(ewc).on_train_begin(SimpleNamespace(world_size=2), None, None)
    EWCCallback(ewc, batches=[]).on_train_begin(SimpleNamespace(world_size=2), None, None)


def test_an_optimizer_built_from_the_model_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(
        Trainer, "get_optimizer_cls_and_kwargs", staticmethod(lambda args: (lambda: None, {}))
    )
    with pytest.raises(ValueError, match="optimizers=\\(EWCOptimizer"):
        ewc_optimizer(EWC(mlp(), ewc_lambda=1.0), arguments(tmp_path))


def test_a_language_models_task_is_consolidated(tmp_path):
    sizes = {"n_positions": 16, "n_embd": 16, "n_layer": 1, "n_head": 2}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=50, **sizes))
    ewc = EWC(model, ewc_lambda=30.0)
    texts = [torch.randint(50, (12,)) for _ in range(16)]
    args = arguments(tmp_path, bf16=True, gradient_accumulation_steps=2)
    callback = EWCCallback(ewc, likelihood="causal_lm", estimator="sampled", max_samples=8)
    for _ in range(2):
        Trainer(
            model,
            args,
            train_dataset=[{"input_ids": text, "labels": text} for text in texts],
            callbacks=[callback],
            optimizer_cls_and_kwargs=ewc_optimizer(ewc, args),
        ).train()
    assert ewc.tasks == 2
    assert all(fisher.any() for fisher in ewc.fisher.values())
