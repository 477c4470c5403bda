"""The process: devices, messages and progress, signals, versions."""
