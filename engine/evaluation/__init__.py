"""Scoring answers: protocols, intervals, baselines, calibration, reports."""
