"""Programs that show the package at work; run from a checkout."""
