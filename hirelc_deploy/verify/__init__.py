"""What the file on disk is really worth: bytes, milliseconds, accuracy, and whether that is enough."""
