"""Calibration: text to token windows, and statistics gathered while a model runs over them."""
