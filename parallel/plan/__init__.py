"""Predicts what a schedule costs on given links and chooses a strategy by it. Imports no torch."""
