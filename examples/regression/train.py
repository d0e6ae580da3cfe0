"""Train the regression example: python examples/regression/train.py (about a minute on one core).

Writes checkpoint.safetensors.  The search split picks nothing; the test split is scored once, at the end.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from network import network
from safetensors.torch import save_file
from task import Angle, task
from torch import nn

from hirelc_deploy.task import Batches

CHECKPOINT = Path(__file__).parent / "checkpoint.safetensors"
EPOCHS, RATE, WEIGHT_DECAY = 30, 3e-3, 0.01


def train(angles: Angle, *, epochs: int, seed: int) -> nn.Module:
    """The trained network in eval mode."""
    torch.manual_seed(seed)
    model = network().train()
    optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=WEIGHT_DECAY)
    steps = epochs * -(-angles.train.examples // angles.train.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.2)
    for epoch in range(epochs):
        for _, inputs, degrees in angles.train.shuffled(seed, epoch):
            outputs = {"output": model(torch.from_numpy(inputs["input"]))}
            loss = angles.loss(outputs, torch.from_numpy(degrees))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


@torch.inference_mode()
def mean_error(model: nn.Module, angles: Angle, batches: Batches) -> float:
    """Mean absolute error of a split in degrees."""
    outputs = [model(torch.from_numpy(inputs["input"])).numpy() for inputs, _ in batches]
    return angles.score({"output": np.concatenate(outputs)}, batches.targets)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=CHECKPOINT, help="the checkpoint to write")
    options = parser.parse_args()

    angles = task()
    model = train(angles, epochs=options.epochs, seed=options.seed)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, options.out)
    for batches in (angles.search, angles.test):
        error = mean_error(model, angles, batches)
        print(f"{batches.split}: mean error {error:.2f} degrees on {batches.examples} images")


if __name__ == "__main__":
    main()
