"""Layers: functions of several numbers at once, whose derivative is a matrix."""
