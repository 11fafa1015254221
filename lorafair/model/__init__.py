"""The model: LoRA layers with a client axis, adapters as one row of numbers, the frozen backbone, its weights."""
