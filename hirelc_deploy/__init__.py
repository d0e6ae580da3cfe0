"""From a trained PyTorch checkpoint to an artifact that was measured on the device it is for."""

__version__ = "0.1.0.dev0"
