"""Fashion-MNIST as a task: --data examples/fashion_mnist/task.py:task"""

from data import splits

from hirelc_deploy.task import ArraySource, Classification


def task() -> Classification:
    """Ten classes; the 6,000 search images are ones that the networks were not trained on."""
    data = splits()
    train, search, test = (ArraySource(data[f"x_{name}"], data[f"y_{name}"]) for name in ("train", "search", "test"))
    return Classification(train, test, search)
