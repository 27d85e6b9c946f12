"""Offline: data, losses, distillation, calibration and evaluation; it leaves behind only files."""
