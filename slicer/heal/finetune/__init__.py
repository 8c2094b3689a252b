"""Training a cut: LoRA, QLoRA, all weights, with or without a teacher."""
