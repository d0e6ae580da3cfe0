"""Train one of the example networks: python examples/fashion_mnist/train.py wide

Writes checkpoints/NAME.safetensors and benchmarks/results/train_NAME.json.  The search split picks nothing
and is scored once an epoch, to be watched; the test split is scored once, at the end.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from data import splits
from networks import NETWORKS
from safetensors.torch import save_file
from torch import Tensor, nn

HERE = Path(__file__).parent
RESULTS = HERE.parents[1] / "benchmarks" / "results"
BATCH = 128
SHIFT = 2  # pixels of random translation
EPOCHS = {"wide": 12, "small": 16, "depthwise": 8, "vit": 7, "small14": 6, "depthwise14": 6, "vit14": 20}

FLOAT32 = ("small14", "depthwise14", "vit14")
"""Trained on a CPU that has no arithmetic for bfloat16 and takes five times as long with it."""


def augment(x: Tensor, random: torch.Generator) -> Tensor:
    """Random horizontal flips and translations of (N, 1, H, W) images, one draw an image."""
    n, _, height, width = x.shape
    flip = torch.rand(n, 1, 1, 1, generator=random) < 0.5
    x = torch.where(flip, x.flip(3), x)
    padded = F.pad(x, (SHIFT,) * 4, value=x.min().item())
    down, right = torch.randint(0, 2 * SHIFT + 1, (2, n, 1), generator=random)
    rows = (down + torch.arange(height))[:, None, :, None]
    columns = (right + torch.arange(width))[:, None, None, :]
    return padded[torch.arange(n)[:, None, None, None], 0, rows, columns]


@torch.inference_mode()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Percent of (N, 1, H, W) images whose highest logit is the label's."""
    model.eval()
    right = sum((model(a).argmax(1) == b).sum().item() for a, b in zip(x.split(500), y.split(500), strict=True))
    return 100 * right / len(y)


def train(name: str, epochs: int, seed: int) -> tuple[nn.Module, dict[str, object]]:
    """The trained network in eval mode, and how it was trained."""
    torch.manual_seed(seed)
    random = torch.Generator().manual_seed(seed)
    data = {
        key: torch.from_numpy(np.ascontiguousarray(value))
        for key, value in splits(14 if name.endswith("14") else 28).items()
    }
    x, y = data["x_train"], data["y_train"]
    model = NETWORKS[name]().to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    steps = epochs * -(-len(y) // BATCH)
    optimizer: torch.optim.Optimizer
    if name.startswith("vit"):
        rate = 1e-3
        optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.05)
    else:
        rate = 0.1
        optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.2)

    began = time.time()
    for epoch in range(epochs):
        model.train()
        for batch in torch.randperm(len(y), generator=random).split(BATCH):
            images = augment(x[batch], random).to(memory_format=torch.channels_last)
            with torch.autocast("cpu", torch.bfloat16, enabled=name not in FLOAT32):
                loss = F.cross_entropy(model(images), y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        watched = accuracy(model, data["x_search"], data["y_search"])
        print(f"epoch {epoch + 1}/{epochs}  search {watched:.2f} %  {time.time() - began:.0f} s", flush=True)

    return model.eval(), {
        "network": name,
        "epochs": epochs,
        "seed": seed,
        "parameters": sum(p.numel() for p in model.parameters()),
        "accuracy_search": accuracy(model, data["x_search"], data["y_search"]),
        "accuracy_test": accuracy(model, data["x_test"], data["y_test"]),
        "seconds": round(time.time() - began),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("network", choices=NETWORKS)
    parser.add_argument("--epochs", type=int, help="default: as the committed checkpoint was trained")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="the checkpoint to write")
    parser.add_argument("--result", type=Path, help="the JSON record to write")
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    name = options.network
    model, record = train(name, options.epochs or EPOCHS[name], options.seed)
    weights = {key: value.contiguous() for key, value in model.state_dict().items()}
    save_file(weights, options.out or HERE / "checkpoints" / f"{name}.safetensors")
    (options.result or RESULTS / f"train_{name}.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
