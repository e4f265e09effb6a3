"""Activations: functions of one number, applied to each element."""
