"""Alpaca-style instruction tuning with LoRA and 8-bit loading."""
