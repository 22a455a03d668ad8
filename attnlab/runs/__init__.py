"""Runs: data through a model once, for all analyses, resumable.

Imports nothing itself: `attnlab.models` needs `attnlab.runs.analysis`, and `attnlab.runs.job` needs the models.
"""
