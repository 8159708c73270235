"""An installed ewc_fast trains, consolidates and pulls back; run from outside the checkout."""

import torch

import ewc_fast

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3))
ewc = ewc_fast.EWC(model, ewc_lambda=10.0)
optimizer = ewc_fast.EWCOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), ewc)
inputs, targets = torch.randn(32, 8), torch.randint(3, (32,))
for _ in range(2):
    for _ in range(5):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
    ewc.consolidate([(inputs, targets)])
assert ewc.tasks == 2
assert optimizer.last_penalty > 0
print(f"{ewc} from {ewc_fast.__file__}")
