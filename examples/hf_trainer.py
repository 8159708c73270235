"""Hugging Face's Trainer: its own optimizer under EWC; a callback consolidates after each task."""

import tempfile

from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.modeling_outputs import SequenceClassifierOutput
from two_tasks import accuracy, compare, network, task

from ewc_fast import EWC
from ewc_fast.integrations.huggingface import EWCCallback, ewc_optimizer


class Classifier(nn.Module):  # stands for AutoModelForSequenceClassification and the like
    def __init__(self) -> None:
        super().__init__()
        self.network = network()

    def forward(self, points, labels=None):
        logits = self.network(points)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def left_of_the_first_task(ewc_lambda: float) -> float:
    model, tasks = Classifier(), [task(1), task(2)]
    ewc = EWC(model, ewc_lambda=ewc_lambda)
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(folder, learning_rate=0.01, num_train_epochs=5, use_cpu=True,
                                 per_device_train_batch_size=50, disable_tqdm=True)  # fmt: skip
        for data in tasks:
            samples = [{"points": points, "labels": label} for points, label in data]
            Trainer(model, args, train_dataset=samples, callbacks=[EWCCallback(ewc)],
                    optimizer_cls_and_kwargs=ewc_optimizer(ewc, args)).train()  # fmt: skip
    return accuracy(model.network, tasks[0])


compare(left_of_the_first_task(ewc_lambda=1000.0), left_of_the_first_task(ewc_lambda=0.0))
