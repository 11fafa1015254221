"""Images: where they come from, which client has which, and how they become batches."""
