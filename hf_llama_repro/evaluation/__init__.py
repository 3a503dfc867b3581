"""hf-llama-eval: a model on the papers' benchmarks, and on tasks of one's own, by lm-evaluation-harness."""
