"""What a run continues from: checkpoints between rounds, and finished clients within one."""
