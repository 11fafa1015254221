"""The output of a run: scalars, TensorBoard, metrics.csv, pictures, result.json, the table; rank 0 only."""
