"""Fine-tuning methods: what is put into a model, what of it is trainable, and how it is merged."""
