"""Trained models as others read them: Hugging Face's layout, that of LLaVA's own code, and PEFT's adapters."""
