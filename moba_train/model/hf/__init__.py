"""Hugging Face checkpoints in and out: settings (`config`, `settings`), names (`names`), files (`read`, `write`)."""
