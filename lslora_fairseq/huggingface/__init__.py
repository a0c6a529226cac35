"""In from Hugging Face folders and out to them, and PEFT's adapters in both directions."""
