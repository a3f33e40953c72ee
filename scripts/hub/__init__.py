"""Push runs to the Hugging Face Hub."""
