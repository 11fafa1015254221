"""The minimisers behind LoRA-FAIR: one factor corrected in closed form or by descent, both at once by trust regions."""
