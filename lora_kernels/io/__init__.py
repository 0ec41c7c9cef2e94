"""Files that people already have: PEFT adapters, Hugging Face models, GGUF."""
