"""Lightning: one callback applies the penalty, consolidates at the end, and is checkpointed."""

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from two_tasks import accuracy, batches, compare, network, task

from ewc_fast import EWC
from ewc_fast.integrations.lightning import EWCCallback


class Classifier(LightningModule):
    """An ordinary module: it knows nothing of EWC."""

    def __init__(self) -> None:
        super().__init__()
        self.network = network()

    def training_step(self, batch, index):
        points, labels = batch
        return F.cross_entropy(self.network(points), labels)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


def left_of_the_first_task(ewc_lambda: float) -> float:
    """Train on two tasks, and return the accuracy on the first."""
    module, tasks = Classifier(), [task(1), task(2)]
    ewc = EWC(module.network, ewc_lambda=ewc_lambda)
    for data in tasks:
        Trainer(max_epochs=5, callbacks=[EWCCallback(ewc)], accelerator="cpu", logger=False,
                enable_checkpointing=False, enable_progress_bar=False,
                enable_model_summary=False).fit(module, batches(data))  # fmt: skip
    return accuracy(module.network, tasks[0])


compare(left_of_the_first_task(ewc_lambda=1000.0), left_of_the_first_task(ewc_lambda=0.0))
