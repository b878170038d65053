"""Evaluation: models with exact marginals, metrics of images, text tasks with checkers, resumable runs, and comparisons."""
