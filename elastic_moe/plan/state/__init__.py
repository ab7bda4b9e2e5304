"""Units of the model's state: their owners, their mirrors, and transfers between ranks."""
