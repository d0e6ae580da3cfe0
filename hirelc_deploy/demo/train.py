"""Make the demo's checkpoint again: python -m hirelc_deploy.demo.train (about a minute on one core).

The search split picks nothing; the test split is scored once, at the end.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from hirelc_deploy.datasets import digits
from hirelc_deploy.demo import CHECKPOINT
from hirelc_deploy.demo.network import network
from hirelc_deploy.task import Batches, Classification

EPOCHS, BATCH, RATE, WEIGHT_DECAY = 60, 64, 0.1, 5e-4
SHIFT = 1  # pixels of random translation


def shift(x: Tensor, random: torch.Generator) -> Tensor:
    """(N, 1, 8, 8) images moved by up to SHIFT pixels each way, one draw an image."""
    n, _, height, width = x.shape
    padded = F.pad(x, (SHIFT,) * 4)
    down, right = torch.randint(0, 2 * SHIFT + 1, (2, n, 1), generator=random)
    rows = (down + torch.arange(height))[:, None, :, None]
    columns = (right + torch.arange(width))[:, None, None, :]
    return padded[torch.arange(n)[:, None, None, None], 0, rows, columns]


def train(task: Classification, *, epochs: int, seed: int) -> nn.Module:
    """The trained network in eval mode."""
    torch.manual_seed(seed)
    random = torch.Generator().manual_seed(seed)
    model = network().train()
    optimizer = torch.optim.SGD(model.parameters(), RATE, momentum=0.9, nesterov=True, weight_decay=WEIGHT_DECAY)
    steps = epochs * -(-task.train.examples // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.2)
    for epoch in range(epochs):
        for _, inputs, target in task.train.shuffled(seed, epoch):
            images = shift(torch.from_numpy(inputs["input"]), random)
            loss = task.loss({"output": model(images)}, torch.from_numpy(target))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


@torch.inference_mode()
def accuracy(model: nn.Module, task: Classification, batches: Batches) -> float:
    """Percent of a split that the network labels right."""
    outputs = [model(torch.from_numpy(inputs["input"])).numpy() for inputs, _ in batches]
    return task.score({"output": np.concatenate(outputs)}, batches.targets)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=CHECKPOINT, help="the checkpoint to write")
    options = parser.parse_args()

    task = digits(batch=BATCH)
    model = train(task, epochs=options.epochs, seed=options.seed)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, options.out)
    for batches in (task.search, task.test):
        print(f"{batches.split} {accuracy(model, task, batches):.2f} % of {batches.examples}")


if __name__ == "__main__":
    main()
