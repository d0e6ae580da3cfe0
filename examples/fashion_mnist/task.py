"""Fashion-MNIST as a task: --data examples/fashion_mnist/task.py:task, or :task14"""

from data import splits

from hirelc_deploy.task import ArraySource, Classification

SEARCH_IMAGES_14 = 2000


def task() -> Classification:
    """Ten classes; the 6,000 search images are ones that the networks were not trained on."""
    return _task(28, 6000)


def task14() -> Classification:
    """The same at 14x14 pixels, with 2,000 of the search images."""
    return _task(14, SEARCH_IMAGES_14)


def _task(pixels: int, search_images: int) -> Classification:
    data = splits(pixels)
    data |= {name: data[name][:search_images] for name in ("x_search", "y_search")}
    train, search, test = (ArraySource(data[f"x_{name}"], data[f"y_{name}"]) for name in ("train", "search", "test"))
    return Classification(train, test, search)
