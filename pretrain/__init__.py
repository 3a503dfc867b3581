"""Training from nothing, by the recipe of the LLaMA papers."""
