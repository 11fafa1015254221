"""What a run leaves to look at: scalars, TensorBoard, metrics.csv, pictures, result.json, the table; rank 0 only."""
