"""Evaluation: metrics, baselines, explanations and the report."""
